"""Every model family as a few thousand random weights, built by ComfyUI's own classes: configuration, model, sampling, latent format."""
import importlib
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.conftest import COMFYUI

UNET = dict(image_size=32, in_channels=4, out_channels=4, model_channels=64, num_res_blocks=[1, 1], channel_mult=[1, 2],
            transformer_depth=[1, 1], transformer_depth_middle=1, transformer_depth_output=[1, 1, 1, 1], context_dim=16, num_heads=2,
            num_head_channels=-1, use_spatial_transformer=True, use_linear_in_transformer=True, use_temporal_attention=False,
            legacy=False, adm_in_channels=None, dtype=torch.float32)
XL = UNET | dict(adm_in_channels=2816, num_classes="sequential")
MMDIT = dict(in_channels=16, out_channels=16, patch_size=2, depth=1, input_size=None, adm_in_channels=16, num_patches=64,
             pos_embed_max_size=8, qk_norm="rms", x_block_self_attn_layers=[], dtype=torch.float32,
             context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64}})
FLUX = dict(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=16, context_in_dim=16, hidden_size=24, mlp_ratio=2.0,
            num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 4, 4], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
            txt_ids_dims=[])
CHROMA = FLUX | dict(image_model="chroma", vec_in_dim=None, in_channels=64, out_channels=64, in_dim=64, out_dim=24, hidden_dim=16,
                     n_layers=1)
COSMOS = dict(max_img_h=64, max_img_w=64, max_frames=16, in_channels=16, out_channels=16, patch_temporal=1, model_channels=48,
              num_blocks=1, num_heads=2, crossattn_emb_channels=16, concat_padding_mask=True, pos_emb_cls="rope3d", pos_emb_learnable=True,
              pos_emb_interpolation="crop", use_adaln_lora=True, adaln_lora_dim=8)
WAN = dict(image_model="wan2.1", model_type="t2v", dim=48, ffn_dim=48, num_heads=2, num_layers=1, freq_dim=16, text_dim=16, text_len=8)
HUNYUAN = FLUX | dict(image_model="hunyuan_video", patch_size=[1, 2, 2], byt5=False, meanflow=False, use_cond_type_embedding=False,
                      vision_in_dim=None, meanflow_sum=False)
QWEN = dict(image_model="qwen_image", num_layers=1, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=16,
            pooled_projection_dim=16, axes_dims_rope=(4, 4, 4))
PARAMETERS = {"flux": "flux.model.FluxParams", "flux2": "flux.model.FluxParams", "chroma": "chroma.model.ChromaParams",
              "chroma_radiance": "chroma_radiance.model.ChromaRadianceParams", "hunyuan_video": "hunyuan_video.model.HunyuanVideoParams",
              "qwen_image": "qwen_image.model.QwenImageTransformer2DModel"}


@dataclass(frozen=True)
class Family:
    """One line of the matrix.

    Args:
        config: class in comfy.supported_models.
        unet: arguments of its diffusion model.
        output: what the model is trained to output: "eps", "v", "v of variance 1", "edm", "flow" or "cosmos"; decides alpha.
        latent: shape of one latent (C, *spatial) that is sampled.
        marks: keys that such a checkpoint carries beside the weights.
        prompt: what its text encoders give beside the (1, 4, 16) context.
        width: of the context.
        note: what a user should know.
        sound: shape of what is sampled beside the picture.
        batch: of latents, where they are the frames of one video.
        needs: a word of ComfyUI's model detection, which tells whether this release has it where the configuration does not.
    """

    config: str
    unet: dict
    output: str
    latent: tuple = (16, 8, 8)
    marks: dict = field(default_factory=dict)
    prompt: dict = field(default_factory=dict)
    width: int = 16
    note: str = ""
    sound: tuple = ()
    batch: int = 1
    needs: str = ""


POOLED, POOLED_XL = {"pooled_output": torch.ones(1, 16)}, {"pooled_output": torch.ones(1, 1280)}
MASKED = {"attention_mask": torch.ones(1, 4, dtype=torch.long)}
ONE, VIDEO = torch.tensor(1.0), (16, 3, 8, 8)
FRAMES = "a bank of pictures applies to every frame"
CFG_1 = "runs at cfg 1, without a negative prompt: connect a reference bank, or unwanted and neutral"
FAMILIES = {
    "SD 1.5": Family("SD15", UNET | dict(use_linear_in_transformer=False), "eps", (4, 8, 8)),
    "SD 1.5 inpainting model": Family("SD15", UNET | dict(in_channels=9), "eps", (4, 8, 8)),
    "SD 2.1-v": Family("SD20", UNET, "v", (4, 8, 8),
                       {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])},
                     note="nothing to set: the checkpoint, or a ModelSampling node before or after ours, says what it predicts"),
    "SDXL": Family("SDXL", XL, "eps", (4, 8, 8), prompt=POOLED_XL),
    "SDXL v": Family("SDXL", XL, "v", (4, 8, 8), {"v_pred": ONE}, POOLED_XL),
    "SDXL v, zero SNR": Family("SDXL", XL, "v", (4, 8, 8), {"v_pred": ONE, "ztsnr": ONE}, POOLED_XL),
    "SDXL EDM v (CosXL)": Family("SDXL", XL, "v", (4, 8, 8), {"edm_vpred.sigma_max": torch.tensor(120.0)}, POOLED_XL),
    "Playground 2.5 (EDM)": Family("SDXL", XL, "edm", (4, 8, 8), {"edm_mean": ONE, "edm_std": ONE}, POOLED_XL),
    "Stable Cascade C": Family("Stable_Cascade_C", dict(c_cond=32, c_hidden=[32, 32], nhead=[2, 2], blocks=[[1, 1], [1, 1]], c_r=16,
                                                        c_clip_text=16, c_clip_text_pooled=16), "eps", (16, 8, 8),
                               prompt={"pooled_output": torch.ones(1, 1, 16)},
                     note="patch stage C, which decides what the picture shows"),
    "PixArt alpha": Family("PixArtAlpha", dict(hidden_size=48, depth=1, num_heads=2, caption_channels=16, model_max_length=4),
                           "eps", (4, 48, 48)),
    "PixArt sigma": Family("PixArtSigma", dict(hidden_size=48, depth=1, num_heads=2, caption_channels=16, model_max_length=4,
                                               micro_condition=False, pe_interpolation=1.0), "eps", (4, 64, 64)),
    "SD 3": Family("SD3", MMDIT, "flow", prompt=POOLED),
    "SD 3.5 medium": Family("SD3", MMDIT | dict(x_block_self_attn_layers=[0]), "flow", prompt=POOLED),
    "AuraFlow": Family("AuraFlow", dict(dim=32, n_layers=2, n_double_layers=1, n_heads=2, global_conddim=32, cond_seq_dim=16,
                                        max_seq=64), "flow", (4, 8, 8)),
    "Flux": Family("Flux", FLUX, "flow", prompt=POOLED, note=CFG_1),
    "Flux schnell": Family("FluxSchnell", FLUX | dict(guidance_embed=False), "flow", prompt=POOLED, note=CFG_1),
    "Chroma": Family("Chroma", CHROMA, "flow", prompt={"pooled_output": None}),
    "Lumina 2": Family("Lumina2", dict(patch_size=2, in_channels=16, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=1,
                                       multiple_of=8, qk_norm=True, cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[30, 30, 30]),
                       "flow", prompt=MASKED),
    "OmniGen 2": Family("Omnigen2", dict(hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
                                         multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(30, 30, 30), text_feat_dim=16), "flow",
                        prompt=MASKED),
    "HiDream": Family("HiDream", dict(patch_size=2, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=12,
                                      num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=16, axes_dims_rope=(4, 4, 4),
                                      max_resolution=(16, 16), llama_layers=[0, 1]), "flow",
                      prompt=POOLED | {"conditioning_llama3": torch.ones(1, 2, 4, 16)}),
    "Qwen-Image": Family("QwenImage", QWEN, "flow", (16, 1, 8, 8),
                         note="pictures of one frame; a bank without the frame axis is given one"),
    "HunyuanImage 2.1": Family("HunyuanImage21", HUNYUAN | dict(in_channels=64, out_channels=64, patch_size=[1, 1], axes_dim=[6, 6],
                                                                vec_in_dim=None, guidance_embed=False), "flow", (64, 8, 8)),
    "Cosmos (EDM)": Family("CosmosT2V", COSMOS | dict(image_model="cosmos", patch_spatial=2, affline_emb_norm=True,
                                                      extra_per_block_abs_pos_emb=True, block_x_format="THWBD",
                                                      extra_per_block_abs_pos_emb_type="learnable"), "edm", VIDEO, note=FRAMES),
    "Cosmos Predict 2 (rectified flow)": Family("CosmosT2IPredict2", COSMOS | dict(patch_spatial=2), "cosmos", (16, 1, 8, 8)),
    "Wan 2.1": Family("WAN21_T2V", WAN, "flow", VIDEO,
                      note=FRAMES + "; the first is one picture, the others hold several: there a still picture only comes near"),
    "Wan 2.2 5B": Family("WAN22_T2V", WAN | dict(in_dim=48, out_dim=48), "flow", (48, 3, 8, 8), note=FRAMES),
    "Hunyuan video": Family("HunyuanVideo", HUNYUAN, "flow", VIDEO, prompt=POOLED, note=FRAMES),
    "Mochi": Family("GenmoMochi", dict(in_channels=12, hidden_size_x=48, hidden_size_y=24, depth=1, num_heads=2, mlp_ratio_x=256,
                                       mlp_ratio_y=2.0, use_t5=True, t5_feat_dim=16, t5_token_length=4, learn_sigma=False,
                                       patch_embed_bias=True, timestep_mlp_bias=True, timestep_scale=1000.0, attend_to_padding=False,
                                       qkv_bias=False, qk_norm=True), "flow", (12, 3, 8, 8),
                    prompt=MASKED, note=FRAMES),
    "LTX video": Family("LTXV", dict(attention_head_dim=12, num_attention_heads=2, caption_channels=16, cross_attention_dim=24,
                                     num_layers=1), "flow", (128, 3, 8, 8), prompt=MASKED, note=FRAMES),
}

LUMINA = dict(patch_size=2, in_channels=16, dim=256, n_layers=1, n_refiner_layers=1, n_heads=8, n_kv_heads=8, multiple_of=8, qk_norm=True,
              cap_feat_dim=16, axes_dims=[8, 12, 12], axes_lens=[30, 30, 30])
Z_IMAGE = LUMINA | dict(image_model="lumina2", rope_theta=256.0, ffn_dim_multiplier=8 / 3, z_image_modulation=True,
                        time_scale=1000.0, pad_tokens_multiple=32)
KANDINSKY = dict(in_text_dim=16, in_text_dim2=16, time_dim=16, model_dim=24, ff_dim=24, num_text_blocks=1, num_visual_blocks=1,
                 axes_dims=(4, 4, 4))
HUNYUAN_15 = HUNYUAN | dict(out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, guidance_embed=False, use_cond_type_embedding=True,
                            vision_in_dim=16, meanflow_sum=True)
PIXEL_DIT = dict(num_groups=2, hidden_size=24, pixel_hidden_size=8, pixel_attn_hidden_size=16, pixel_num_groups=2, patch_depth=1,
                 pixel_depth=1, patch_size=4, txt_embed_dim=16, txt_max_length=8)
COG = dict(num_attention_heads=2, attention_head_dim=12, time_embed_dim=16, text_embed_dim=16, num_layers=1, max_text_seq_length=4,
           use_rotary_positional_embeddings=True)
VIDEO_UNET = UNET | dict(in_channels=8, num_classes="sequential", use_temporal_resblock=True, use_temporal_attention=True,
                         extra_ff_mix_layer=True, video_kernel_size=[3, 1, 1], merge_factor=0.0, merge_strategy="learned_with_images",
                         disable_temporal_crossattention=False, max_ddpm_temb_period=10000)
HYDIT = dict(input_size=8, hidden_size=48, depth=2, num_heads=2, text_states_dim=16, text_states_dim_t5=16, text_len=4, text_len_t5=4)
LTX_AV = dict(attention_head_dim=12, num_attention_heads=2, audio_attention_head_dim=12, audio_num_attention_heads=2, caption_channels=24,
              cross_attention_dim=24, audio_cross_attention_dim=24, num_layers=1, connector_attention_head_dim=12,
              connector_num_attention_heads=2, connector_num_layers=1)
ALL = torch.ones(1, 4)
CONTROLLED = "what it is given beside the prompt (a first frame, a pose, a voice) is ComfyUI's to hand over"
FAMILIES |= {
    "SDXL refiner": Family("SDXLRefiner", UNET | dict(adm_in_channels=2560, num_classes="sequential"), "eps", (4, 8, 8), prompt=POOLED_XL),
    "SD 1.5 instruct-pix2pix": Family("SD15_instructpix2pix", UNET | dict(in_channels=8, use_linear_in_transformer=False), "eps",
                                      (4, 8, 8)),
    "SDXL instruct-pix2pix": Family("SDXL_instructpix2pix", XL | dict(in_channels=8), "eps", (4, 8, 8), prompt=POOLED_XL),
    "SD x4 upscaler": Family("SD_X4Upscaler", UNET | dict(in_channels=7, num_classes=1000, disable_self_attentions=[True, False]), "v",
                             (4, 8, 8)),
    "Stable Zero123": Family("Stable_Zero123", UNET | dict(in_channels=8, use_linear_in_transformer=False), "eps", (4, 8, 8),
                             {"cc_projection.weight": torch.ones(16, 16), "cc_projection.bias": torch.ones(16)}),
    "Stable Cascade B": Family("Stable_Cascade_B", dict(c_cond=32, c_hidden=[32, 32], nhead=[-1, 2], blocks=[[1, 1], [1, 1]], c_clip=16,
                                                        level_config=["CT", "CTA"], block_repeat=[[1, 1], [1, 1]]), "eps", (4, 16, 16),
                               prompt={"pooled_output": torch.ones(1, 1, 16)}, note="patch stage C instead: it decides what is shown"),
    "HunyuanDiT": Family("HunyuanDiT", HYDIT, "v", (4, 8, 8), prompt={"conditioning_mt5xl": torch.ones(1, 4, 16), "attention_mask": ALL,
                                                                      "attention_mask_mt5xl": ALL}),
    "Flux fill": Family("FluxInpaint", FLUX | dict(in_channels=96), "flow", prompt=POOLED),
    "Flux.2 (dev, Klein)": Family("Flux2", FLUX | dict(
        image_model="flux2", in_channels=128, out_channels=128, patch_size=1, axes_dim=[4, 4, 2, 2], vec_in_dim=None, theta=2000,
        mlp_ratio=3.0, global_modulation=True, mlp_silu_act=True, qkv_bias=False, ops_bias=False, default_ref_method="index",
        ref_index_scale=10.0, txt_ids_dims=[3]), "flow", (128, 4, 4), note="Klein runs at cfg 1, as Flux does"),
    "LongCat-Image": Family("LongCatImage", FLUX | dict(vec_in_dim=None, guidance_embed=False, txt_ids_dims=[1, 2]), "flow"),
    "Chroma Radiance": Family("ChromaRadiance", CHROMA | dict(
        image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=4, nerf_hidden_size=8, nerf_mlp_ratio=2, nerf_depth=1,
        nerf_max_freqs=2, nerf_tile_size=0, nerf_final_head_type="conv", nerf_embedder_dtype=torch.float32, use_x0=False,
        use_sequential_txt_ids=False), "flow", (3, 16, 16), prompt={"pooled_output": None},
        note="samples pixels: choose `pixel_space` for the VAE, of the banks too"),
    "Z-Image (Turbo)": Family("ZImage", Z_IMAGE, "flow", prompt=MASKED, note="Turbo runs at cfg 1, as Flux does"),
    "Z-Image, pixels": Family("ZImagePixelSpace", Z_IMAGE | dict(image_model="zimage_pixel", patch_size=4, in_channels=3,
                                                                 decoder_in_channels=48, decoder_hidden_size=24, decoder_num_res_blocks=1,
                                                                 decoder_max_freqs=4), "flow", (3, 16, 16), prompt=MASKED,
                              note="samples pixels"),
    "PixelDiT": Family("PixelDiTT2I", PIXEL_DIT, "flow", (3, 16, 16), note="samples pixels"),
    "PiD": Family("PiD", PIXEL_DIT | dict(lq_latent_channels=16, lq_hidden_dim=16, lq_num_res_blocks=1, patch_size=16), "flow", (3, 32, 32),
                  prompt={"lq_latent": torch.ones(1, 16, 1, 1), "degrade_sigma": torch.zeros(1)},
                  note="decodes what another model has made: correct that one"),
    "HiDream-O1": Family("HiDreamO1", dict(
        text_config_overrides=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                   head_dim=16, rope_dims=[4, 2, 2]),
        vision_config_overrides=dict(hidden_size=16, num_heads=2, intermediate_size=16, depth=1, num_position_embeddings=16,
                                     deepstack_visual_indexes=())), "flow", (3, 64, 64),
        prompt={"text_input_ids": torch.tensor([[1, 2, 3, 4]])}, note="samples pixels, with noise 8 times as strong as other flow models"),
    "Ideogram 4": Family("Ideogram4", dict(in_channels=128, num_layers=1, num_attention_heads=2, attention_head_dim=12,
                                           intermediate_size=24, adaln_dim=16, llm_features_dim=16, mrope_section=(2, 2, 2)),
                         "flow", (128, 4, 4),
                         note="DualModelGuider's other model gives the unconditional prediction"),
    "Krea 2": Family("Krea2", dict(features=64, tdim=16, txtdim=16, heads=2, kvheads=1, multiplier=2, layers=1, patch=2, channels=16,
                                   txtlayers=1, txtheads=2, txtkvheads=2), "flow", (16, 1, 8, 8), note="Turbo runs at cfg 1, as Flux does"),
    "Lens": Family("Lens", dict(in_channels=128, out_channels=32, num_layers=1, num_attention_heads=2, attention_head_dim=12,
                                enc_hidden_dim=16, axes_dims_rope=(4, 4, 4), multi_layer_encoder_feature=False, selected_layer_index=(0,)),
                   "flow", (128, 4, 4), prompt=MASKED),
    "ERNIE-Image": Family("ErnieImage", dict(hidden_size=24, num_attention_heads=2, num_layers=1, ffn_hidden_size=24, text_in_dim=16,
                                             rope_axes_dim=(4, 4, 4)), "flow", (128, 4, 4)),
    "Mage-Flow": Family("MageFlow", dict(num_layers=1, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=16,
                                         axes_dims_rope=(4, 4, 4)), "flow", (128, 4, 4)),
    "JoyImage": Family("JoyImage", dict(hidden_size=24, num_attention_heads=2, text_dim=16, mlp_width_ratio=2.0, num_layers=1,
                                        rope_dim_list=[4, 4, 4]), "flow", (16, 1, 8, 8)),
    "Boogu": Family("Boogu", dict(hidden_size=24, num_layers=1, num_double_stream_layers=1, num_refiner_layers=1, num_attention_heads=2,
                                  num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(30, 30, 30), instruction_feat_dim=16),
                    "flow", prompt=MASKED),
    "Anima": Family("Anima", COSMOS | dict(patch_spatial=2), "flow", (16, 1, 8, 8)),
    "Qwen-Image Edit": Family("QwenImage", QWEN | dict(default_ref_method="index_timestep_zero"), "flow", (16, 1, 8, 8),
                              prompt={"reference_latents": [torch.ones(1, 16, 1, 8, 8)]}),
    "Qwen-Image Layered": Family("QwenImage", QWEN | dict(use_additional_t_cond=True, default_ref_method="negative_index"), "flow", VIDEO,
                                 needs="use_additional_t_cond",
                                 note="the first frame is the whole picture, the others are its layers: a bank applies to each of them"),
    "Kandinsky 5, pictures": Family("Kandinsky5Image", KANDINSKY | dict(visual_embed_dim=64), "flow", prompt=POOLED),
    "Kandinsky 5, videos": Family("Kandinsky5", KANDINSKY, "flow", VIDEO, prompt=POOLED, note=FRAMES),
    "HunyuanImage 2.1 refiner": Family("HunyuanImage21Refiner", HUNYUAN | dict(
        in_channels=128, out_channels=64, patch_size=[1, 1, 1], vec_in_dim=None, guidance_embed=False), "flow", (64, 1, 8, 8),
        note="refines what is there already: correct the first model too"),
    "HunyuanVideo 1.5": Family("HunyuanVideo15", HUNYUAN_15 | dict(in_channels=65), "flow", (32, 3, 8, 8), prompt=POOLED, note=FRAMES),
    "HunyuanVideo 1.5, super-resolution": Family("HunyuanVideo15_SR_Distilled", HUNYUAN_15 | dict(in_channels=98), "flow", (32, 3, 8, 8),
                                                 prompt=POOLED, note=FRAMES),
    "Hunyuan video, from a picture": Family("HunyuanVideoI2V", HUNYUAN | dict(in_channels=33), "flow", VIDEO, prompt=POOLED, note=FRAMES),
    "SkyReels, from a picture": Family("HunyuanVideoSkyreelsI2V", HUNYUAN | dict(in_channels=32), "flow", VIDEO, prompt=POOLED,
                                       note=FRAMES),
    "Cosmos, from a picture": Family("CosmosI2V", COSMOS | dict(
        image_model="cosmos", patch_spatial=2, affline_emb_norm=True, extra_per_block_abs_pos_emb=True, block_x_format="THWBD",
        extra_per_block_abs_pos_emb_type="learnable", in_channels=17), "edm", VIDEO, note=FRAMES),
    "Cosmos Predict 2, from a picture": Family("CosmosI2VPredict2", COSMOS | dict(patch_spatial=2, in_channels=17), "cosmos", VIDEO,
                                               note=FRAMES),
    "LTX-2 (picture and sound)": Family("LTXAV", LTX_AV, "flow", (128, 3, 4, 4), width=48, sound=(8, 5, 16),
                                        note="the pictures are corrected, the sound is left alone"),
    "MiniMax-H3 (picture and sound)": Family("MiniMaxH3", dict(
        hidden_size=48, num_layers=1, token_refiner_num_layers=1, num_attention_heads=2, attention_head_dim=32, ffn_hidden_size=48,
        text_dim=16, timestep_input_dim=16, time_embed_hidden_size=16, time_embed_dim=16, rope_inv_freq_len=4), "flow", (24, 3, 4, 4),
        sound=(32, 2, 15), note="the pictures are corrected, the sound is left alone"),
    "CogVideoX": Family("CogVideoX_T2V", COG, "v of variance 1", VIDEO,
                        note=FRAMES + "; only VOIDSampler samples it as it was trained, KSampler does not"),
    "CogVideoX 5B and 1.5": Family("CogVideoX_T2V", COG | dict(num_attention_heads=48, attention_head_dim=16, patch_size_t=2),
                                   "v of variance 1", (16, 4, 8, 8), note=FRAMES + "; its latents have another scale than the 2B model's"),
    "CogVideoX, from a picture": Family("CogVideoX_I2V", COG | dict(in_channels=32), "v of variance 1", VIDEO, note=FRAMES),
    "CogVideoX, inpainting": Family("CogVideoX_Inpaint", COG | dict(in_channels=48), "v of variance 1", VIDEO, note=FRAMES),
    "SeedVR2": Family("SeedVR2", dict(norm_eps=1e-5, num_layers=2, mlp_type="swiglu", vid_dim=24, txt_in_dim=16, heads=2, head_dim=12,
                                      mm_layers=1, expand_ratio=2, rope_dim=12, rope_type="mmrope3d"), "flow", VIDEO,
                      prompt={"condition": torch.ones(1, 17, 3, 8, 8)}, note="restores what is there already"),
    "SVD": Family("SVD_img2vid", VIDEO_UNET | dict(adm_in_channels=768), "v", (4, 8, 8), batch=3,
                  note="its frames are the batch: a bank of pictures applies to each"),
    "SV3D": Family("SV3D_u", VIDEO_UNET | dict(adm_in_channels=256), "v", (4, 8, 8), batch=3,
                   note="its views are the batch: a bank of pictures applies to each"),
    "Wan, from a picture": Family("WAN21_I2V", WAN | dict(model_type="i2v", in_dim=36), "flow", VIDEO, note=FRAMES),
    "Wan Fun Control": Family("WAN21_FunControl2V", WAN | dict(in_dim=48), "flow", VIDEO, note=CONTROLLED),
    "Wan VACE": Family("WAN21_Vace", WAN | dict(model_type="vace", vace_layers=1, vace_in_dim=96), "flow", VIDEO, note=CONTROLLED),
    "Wan 2.1 camera": Family("WAN21_Camera", WAN | dict(model_type="camera", in_dim=32), "flow", VIDEO, note=CONTROLLED),
    "Wan 2.2 camera": Family("WAN22_Camera", WAN | dict(model_type="camera_2.2", in_dim=36), "flow", VIDEO, note=CONTROLLED),
    "Wan S2V": Family("WAN22_S2V", WAN | dict(model_type="s2v", audio_dim=16, num_audio_token=2, audio_inject_layers=[0]), "flow", VIDEO,
                      note=CONTROLLED),
    "Wan HuMo": Family("WAN21_HuMo", WAN | dict(model_type="humo", in_dim=36, audio_token_num=2), "flow", VIDEO, note=CONTROLLED),
    "Wan Animate": Family("WAN22_Animate", WAN | dict(model_type="animate", in_dim=36, motion_encoder_dim=16), "flow", VIDEO,
                          note=CONTROLLED),
    "Wan Animate 2": Family("WAN_Animate2", WAN | dict(model_type="animate2", in_dim=36), "flow", VIDEO, note=CONTROLLED),
    "Wan SCAIL": Family("WAN21_SCAIL", WAN | dict(model_type="scail", in_dim=20), "flow", VIDEO, note=CONTROLLED),
    "Wan SCAIL 2": Family("WAN21_SCAIL2", WAN | dict(model_type="scail2", in_dim=20), "flow", VIDEO, note=CONTROLLED),
    "WanDancer": Family("WAN22_WanDancer", WAN | dict(model_type="wandancer", in_dim=36, audio_inject_layers=[0], music_dim=16,
                                                      music_heads=2, music_latent_dim=16), "flow", VIDEO, note=CONTROLLED),
    "Wan, causal": Family("WAN21_CausalAR_T2V", WAN, "flow", VIDEO, note="with stock samplers; its own sampler goes chunk by chunk"),
}
SECONDS = {f"conditioner.conditioners.{end}.embedder.embedding.{key}": torch.zeros(shape) for end in ("seconds_start", "seconds_total")
           for key, shape in (("0.weights", 128), ("1.weight", (768, 257)), ("1.bias", 768))}
HUNYUAN_3D = dict(hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=16)
NO_NETWORK = dict(disable_unet_model_creation=True)  # of gigabytes whatever its configuration says; what is refused does not ask it
REFUSED = {
    "Lotus (IMG_TO_IMG)": Family("LotusD", UNET | dict(adm_in_channels=4), "x0", (4, 8, 8)),
    "Stable Audio": Family("StableAudio", dict(embed_dim=768, depth=1, num_heads=12), "v", (64, 32), SECONDS, width=768),
    "ACE-Step audio": Family("ACEStep", dict(num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embedding_dim=16,
                                             lyric_encoder_vocab_size=8, max_position=64), "flow", (8, 16, 8),
                             prompt={"conditioning_lyrics": torch.ones(1, 4, dtype=torch.long)}),
    "Wan FlowRVS (picture to picture)": Family("WAN21_FlowRVS", WAN, "x0", VIDEO),
    "Stable Audio 3": Family("StableAudio3", dict(
        embed_dim=768, depth=1, num_heads=12, timestep_features_type="learned", cond_token_dim=768, global_cond_dim=768, io_channels=256,
        project_cond_tokens=False), "flow", (256, 32), {key: value for key, value in SECONDS.items() if "total" in key}, width=768),
    "ACE-Step 1.5 audio": Family("ACEStep15", dict(
        hidden_size=24, text_hidden_dim=16, num_dit_layers=1, num_lyric_layers=1, num_timbre_layers=1, num_tokenizer_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=12, intermediate_size=24, encoder_hidden_size=24, encoder_intermediate_size=24, encoder_num_heads=2,
        fsq_dim=24), "flow", (64, 32), prompt={"conditioning_lyrics": torch.ones(1, 4, 16)}),
    "Hunyuan 3D 2.1": Family("Hunyuan3Dv2_1", dict(in_channels=64, context_dim=16, hidden_size=24, num_heads=2, depth=1), "flow", (64, 32)),
    "Trellis 2": Family("Trellis2", dict(resolution=16, model_channels=64, cond_channels=16, num_blocks=1, num_heads=2, mlp_ratio=1.0),
                        "flow", (32, 16, 16, 16), prompt={"embeds": torch.ones(1, 4, 16)}),
    "TripoSplat": Family("TripoSplat", dict(q_token_length=8, model_channels=32, cond_channels=16, num_blocks=1, num_refiner_blocks=1,
                                            num_heads=2, num_head_channels=16, mlp_ratio=1), "flow", (8, 16), sound=(1, 5)),
    "Hunyuan 3D": Family("Hunyuan3Dv2", HUNYUAN_3D, "flow", (64, 32)),
    "Hunyuan 3D mini": Family("Hunyuan3Dv2mini", HUNYUAN_3D, "flow", (64, 32)),
    "MiniMax Music 3": Family("MiniMaxMusic3", NO_NETWORK, "flow", (128, 32)),
}


def known(unet: dict) -> dict:
    """What this release's network takes of `unet`: later ones take more, and refuse what they do not know."""
    if unet.get("image_model") not in PARAMETERS:
        return unet
    module, name = f"comfy.ldm.{PARAMETERS[unet['image_model']]}".rsplit(".", 1)
    names = {*inspect.signature(getattr(importlib.import_module(module), name)).parameters, "image_model"}
    return {key: value for key, value in unet.items() if key in names}


# Differ from a row in the sizes of the network only: what is sampled, and in which format, is that of the class named.
SAME_AS = {"SD21UnclipL": "SD20", "SD21UnclipH": "SD20", "SSD1B": "SDXL", "KOALA_700M": "SDXL", "KOALA_1B": "SDXL",
           "Segmind_Vega": "SDXL", "SV3D_p": "SV3D_u", "HunyuanDiT1": "HunyuanDiT"}
FINDS = "tells what a picture shows: a node of its own calls the network, which predicts nothing that a sampler could use"
NOT_SAMPLED = {"RT_DETR_v4": FINDS, "SAM3": FINDS, "SAM31": FINDS, "DepthAnything3": FINDS}


def here(families: dict[str, Family]) -> dict[str, Family]:
    """Those that this ComfyUI has."""
    if not COMFYUI:
        return families
    folder = Path(COMFYUI) / "comfy"
    models, detection = ((folder / f"{name}.py").read_text(encoding="utf-8") for name in ("supported_models", "model_detection"))
    names = set(re.findall(r"^class (\w+)", models, re.MULTILINE))
    return {name: family for name, family in families.items() if family.config in names and family.needs in detection}


def build(family: Family):
    """A MODEL as ComfyUI's loader makes it, its weights drawn small and at random."""
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, family.config)(known(family.unet))
    config.unet_config |= known(family.unet)  # some have sizes of their own
    with torch.no_grad():
        model = config.get_model(dict(family.marks), device=torch.device("cpu"))
    if family.unet == NO_NETWORK:
        model.diffusion_model = torch.nn.Identity()
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


def noise(family: Family, seed: int, batch: int = 1):
    """What is sampled at the start: of the picture, and of the sound beside it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(batch, *shape, generator=generator) for shape in (family.latent, family.sound) if shape]
    if len(drawn) == 1:
        return drawn[0]
    from comfy.nested_tensor import NestedTensor
    return NestedTensor(drawn)
