"""Every model family as a few thousand random weights, built by ComfyUI's own classes: configuration, model, sampling, latent format."""
from dataclasses import dataclass, field

import torch

UNET = dict(image_size=32, in_channels=4, out_channels=4, model_channels=64, num_res_blocks=[1, 1], channel_mult=[1, 2],
            transformer_depth=[1, 1], transformer_depth_middle=1, transformer_depth_output=[1, 1, 1, 1], context_dim=16, num_heads=2,
            num_head_channels=-1, use_spatial_transformer=True, use_linear_in_transformer=True, use_temporal_attention=False,
            legacy=False, adm_in_channels=None, dtype=torch.float32)
XL = UNET | dict(adm_in_channels=2816, num_classes="sequential")
MMDIT = dict(in_channels=16, out_channels=16, patch_size=2, depth=1, input_size=None, adm_in_channels=16, num_patches=64,
             pos_embed_max_size=8, qk_norm="rms", x_block_self_attn_layers=[], dtype=torch.float32,
             context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64}})
FLUX = dict(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=16, context_in_dim=16, hidden_size=24, mlp_ratio=2.0,
            num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 4, 4], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True)
CHROMA = {key: FLUX[key] for key in FLUX if key not in ("vec_in_dim", "guidance_embed", "in_channels", "out_channels")} | dict(
    image_model="chroma", in_channels=64, out_channels=64, in_dim=64, out_dim=24, hidden_dim=16, n_layers=1)
COSMOS = dict(max_img_h=64, max_img_w=64, max_frames=16, in_channels=16, out_channels=16, patch_temporal=1, model_channels=48,
              num_blocks=1, num_heads=2, crossattn_emb_channels=16, concat_padding_mask=True, pos_emb_cls="rope3d", pos_emb_learnable=True,
              pos_emb_interpolation="crop", use_adaln_lora=True, adaln_lora_dim=8)
WAN = dict(image_model="wan2.1", model_type="t2v", dim=48, ffn_dim=48, num_heads=2, num_layers=1, freq_dim=16, text_dim=16, text_len=8)
HUNYUAN = FLUX | dict(image_model="hunyuan_video", patch_size=[1, 2, 2], byt5=False, meanflow=False)


@dataclass(frozen=True)
class Family:
    """One line of the matrix.

    Args:
        config: class in comfy.supported_models.
        unet: arguments of its diffusion model.
        output: what the model is trained to output: "eps", "v", "edm", "flow" or "cosmos"; decides alpha.
        latent: shape of one latent (C, *spatial) that is sampled.
        marks: keys that such a checkpoint carries beside the weights.
        prompt: what its text encoders give beside the (1, 4, 16) context.
        width: of the context.
    """

    config: str
    unet: dict
    output: str
    latent: tuple = (16, 8, 8)
    marks: dict = field(default_factory=dict)
    prompt: dict = field(default_factory=dict)
    width: int = 16


POOLED, POOLED_XL = {"pooled_output": torch.ones(1, 16)}, {"pooled_output": torch.ones(1, 1280)}
ONE, VIDEO = torch.tensor(1.0), (16, 3, 8, 8)
FAMILIES = {
    "SD 1.5": Family("SD15", UNET | dict(use_linear_in_transformer=False), "eps", (4, 8, 8)),
    "SD 1.5 inpainting model": Family("SD15", UNET | dict(in_channels=9), "eps", (4, 8, 8)),
    "SD 2.1-v": Family("SD20", UNET, "v", (4, 8, 8),
                       {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])}),
    "SDXL": Family("SDXL", XL, "eps", (4, 8, 8), prompt=POOLED_XL),
    "SDXL v": Family("SDXL", XL, "v", (4, 8, 8), {"v_pred": ONE}, POOLED_XL),
    "SDXL v, zero SNR": Family("SDXL", XL, "v", (4, 8, 8), {"v_pred": ONE, "ztsnr": ONE}, POOLED_XL),
    "SDXL EDM v (CosXL)": Family("SDXL", XL, "v", (4, 8, 8), {"edm_vpred.sigma_max": torch.tensor(120.0)}, POOLED_XL),
    "Playground 2.5 (EDM)": Family("SDXL", XL, "edm", (4, 8, 8), {"edm_mean": ONE, "edm_std": ONE}, POOLED_XL),
    "Stable Cascade C": Family("Stable_Cascade_C", dict(c_cond=32, c_hidden=[32, 32], nhead=[2, 2], blocks=[[1, 1], [1, 1]], c_r=16,
                                                        c_clip_text=16, c_clip_text_pooled=16), "eps", (16, 8, 8),
                               prompt={"pooled_output": torch.ones(1, 1, 16)}),
    "PixArt alpha": Family("PixArtAlpha", dict(hidden_size=48, depth=1, num_heads=2, caption_channels=16, model_max_length=4),
                           "eps", (4, 48, 48)),
    "PixArt sigma": Family("PixArtSigma", dict(hidden_size=48, depth=1, num_heads=2, caption_channels=16, model_max_length=4,
                                               micro_condition=False, pe_interpolation=1.0), "eps", (4, 64, 64)),
    "SD 3": Family("SD3", MMDIT, "flow", prompt=POOLED),
    "SD 3.5 medium": Family("SD3", MMDIT | dict(x_block_self_attn_layers=[0]), "flow", prompt=POOLED),
    "AuraFlow": Family("AuraFlow", dict(dim=32, n_layers=2, n_double_layers=1, n_heads=2, global_conddim=32, cond_seq_dim=16,
                                        max_seq=64), "flow", (4, 8, 8)),
    "Flux": Family("Flux", FLUX, "flow", prompt=POOLED),
    "Flux schnell": Family("FluxSchnell", FLUX | dict(guidance_embed=False), "flow", prompt=POOLED),
    "Chroma": Family("Chroma", CHROMA, "flow", prompt={"pooled_output": None}),
    "Lumina 2": Family("Lumina2", dict(patch_size=2, in_channels=16, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=1,
                                       multiple_of=8, qk_norm=True, cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[30, 30, 30]),
                       "flow", prompt={"attention_mask": torch.ones(1, 4, dtype=torch.long)}),
    "OmniGen 2": Family("Omnigen2", dict(hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
                                         multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(30, 30, 30), text_feat_dim=16), "flow",
                        prompt={"attention_mask": torch.ones(1, 4, dtype=torch.long)}),
    "HiDream": Family("HiDream", dict(patch_size=2, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=12,
                                      num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=16, axes_dims_rope=(4, 4, 4),
                                      max_resolution=(16, 16), llama_layers=[0, 1]), "flow",
                      prompt=POOLED | {"conditioning_llama3": torch.ones(1, 2, 4, 16)}),
    "Qwen-Image": Family("QwenImage", dict(num_layers=1, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=16,
                                           pooled_projection_dim=16, axes_dims_rope=(4, 4, 4)), "flow", (16, 1, 8, 8)),
    "HunyuanImage 2.1": Family("HunyuanImage21", HUNYUAN | dict(in_channels=64, out_channels=64, patch_size=[1, 1], axes_dim=[6, 6],
                                                                vec_in_dim=None, guidance_embed=False), "flow", (64, 8, 8)),
    "Cosmos (EDM)": Family("CosmosT2V", COSMOS | dict(image_model="cosmos", patch_spatial=2, affline_emb_norm=True,
                                                      extra_per_block_abs_pos_emb=True, block_x_format="THWBD",
                                                      extra_per_block_abs_pos_emb_type="learnable"), "edm", VIDEO),
    "Cosmos Predict 2 (rectified flow)": Family("CosmosT2IPredict2", COSMOS | dict(patch_spatial=2), "cosmos", (16, 1, 8, 8)),
    "Wan 2.1": Family("WAN21_T2V", WAN, "flow", VIDEO),
    "Wan 2.2 5B": Family("WAN22_T2V", WAN | dict(in_dim=48, out_dim=48), "flow", (48, 3, 8, 8)),
    "Hunyuan video": Family("HunyuanVideo", HUNYUAN, "flow", VIDEO, prompt=POOLED),
    "Mochi": Family("GenmoMochi", dict(in_channels=12, hidden_size_x=48, hidden_size_y=24, depth=1, num_heads=2, mlp_ratio_x=256,
                                       mlp_ratio_y=2.0, use_t5=True, t5_feat_dim=16, t5_token_length=4, learn_sigma=False,
                                       patch_embed_bias=True, timestep_mlp_bias=True, timestep_scale=1000.0, attend_to_padding=False,
                                       qkv_bias=False, qk_norm=True), "flow", (12, 3, 8, 8),
                    prompt={"attention_mask": torch.ones(1, 4, dtype=torch.long)}),
    "LTX video": Family("LTXV", dict(attention_head_dim=12, num_attention_heads=2, caption_channels=16, cross_attention_dim=24,
                                     num_layers=1), "flow", (128, 3, 8, 8), prompt={"attention_mask": torch.ones(1, 4, dtype=torch.long)}),
}
SECONDS = {f"conditioner.conditioners.{end}.embedder.embedding.{key}": torch.zeros(shape) for end in ("seconds_start", "seconds_total")
           for key, shape in (("0.weights", 128), ("1.weight", (768, 257)), ("1.bias", 768))}
REFUSED = {
    "Lotus (IMG_TO_IMG)": Family("LotusD", UNET | dict(adm_in_channels=4), "x0", (4, 8, 8)),
    "Stable Audio": Family("StableAudio", dict(embed_dim=64, depth=1, num_heads=1), "v", (64, 32), SECONDS, width=768),
    "ACE-Step audio": Family("ACEStep", dict(num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embedding_dim=16,
                                             lyric_encoder_vocab_size=8, max_position=64), "flow", (8, 16, 8),
                             prompt={"conditioning_lyrics": torch.ones(1, 4, dtype=torch.long)}),
    "Hunyuan 3D": Family("Hunyuan3Dv2", dict(hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=16), "flow",
                         (64, 32)),
}


def build(family: Family):
    """A MODEL as ComfyUI's loader makes it, its weights drawn small and at random."""
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, family.config)(family.unet)
    model = config.get_model(dict(family.marks), device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for weight in model.diffusion_model.state_dict().values():
        if weight.is_floating_point():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def conditioning(family: Family, seed: int) -> list:
    """A prompt in the form of the family's text encoders."""
    context = torch.randn(1, 4, family.width, generator=torch.Generator().manual_seed(seed))
    return [[context, dict(family.prompt)]]
