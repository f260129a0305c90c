"""Keep Out: the one node that an artist needs, a box for words between the model and the sampler."""
from comfy_api.latest import io

from ...safe_denoiser.denoiser import SafeDenoiser
from ...safe_denoiser.meaning.texts import lines_of
from ..io_types import CATEGORY, OWN_TEXT, NegationBankType, found_by
from ..models.text_encoders import encoded
from ..progress import Board
from .steer import patch

WORDS = (  # by which people look for it, in the languages of the page
    "unwanted", "unsafe", "nsfw", "nsfw filter", "nudity", "censor", "exclude", "remove", "avoid", "block", "filter", "content filter",
    "prevent", "suppress", "blocklist", "trademark", "celebrity", "negative prompt flux", "safe", "safety", "ban", "negative prompt",
    "不想要", "不安全", "裸体", "裸露", "审查", "排除", "去除", "避免", "屏蔽", "过滤", "内容过滤", "阻止", "抑制", "黑名单", "商标",
    "名人", "负面提示词",
    "不要", "危険", "ヌード", "検閲", "除外", "削除", "避ける", "ブロック", "フィルター", "防ぐ", "ブロックリスト", "商標", "有名人",
    "ネガティブプロンプト",
    "원하지 않는", "안전", "누드", "검열", "제외", "제거", "피하기", "차단", "필터", "방지", "억제", "상표", "유명인", "네거티브 프롬프트",
    "indésirable", "non désiré", "nudité", "censure", "exclure", "supprimer", "éviter", "bloquer", "filtre", "empêcher", "liste noire",
    "marque", "célébrité", "prompt négatif", "no deseado", "desnudez", "censura", "excluir", "eliminar", "evitar", "bloquear", "filtro",
    "impedir", "suprimir", "lista negra", "marca registrada", "famoso", "prompt negativo")


class KeepOut(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserKeepOut", display_name="Keep Out", category=CATEGORY, **found_by(*WORDS),
            description="Keeps what you write out of the pictures, whatever the prompt asks for. Put it between the model and the sampler; "
                        "nothing else changes. Works at cfg 1 too, where a negative prompt does nothing (arXiv:2502.08011).",
            inputs=[
                io.Model.Input("model", tooltip="The model to patch; it is cloned, the original stays as it is."),
                io.Clip.Input("clip", tooltip="The text encoder of that model."),
                io.String.Input("text", default="", multiline=True, placeholder="what must not appear, one thing per line",
                                tooltip="What must not appear, one thing per line, each as you would write it in a prompt. Lines are kept "
                                        "apart: each steers by itself, and makes a step a little longer."),
                io.Float.Input("strength", default=SafeDenoiser.strength, min=0.0, max=10.0, step=0.01,
                               tooltip="How hard it steers. 1: as derived. 0: off, bit for bit as without this node. Up to 2 for more."),
                NegationBankType.Input("negation_bank", optional=True,
                                       tooltip="Pictures of what the first line names, from Build or Load Negation Bank. With no text they "
                                               "steer alone, which does little on photographs. Optional."),
                NegationBankType.Input("reference_bank", optional=True,
                                       tooltip="The model's own samples, from Sample Reference Bank: harmless pictures then change less. "
                                               "Optional."),
            ],
            hidden=OWN_TEXT,
            outputs=[io.Model.Output(tooltip="The patched model, for any sampler or guider.")],
        )

    @classmethod
    def execute(cls, model, clip, text, strength, negation_bank=None, reference_bank=None) -> io.NodeOutput:
        if clip is None:
            raise ValueError("clip is empty: this checkpoint has no text encoder; load one with Load CLIP and connect it")
        lines = lines_of(text)
        if not lines and negation_bank is None:
            raise ValueError("nothing says what must not appear; write it into text, one thing per line, or connect negation_bank")
        neutral = encoded(clip, "") if lines else None  # the very same for all lines, so that it is evaluated once
        board, banks = Board(), dict(bank=negation_bank, retain=None, reference=reference_bank)
        for line in lines or [""]:
            unwanted, what = (encoded(clip, line), f"“{line}”") if line else (None, "")
            model, _ = patch(model, banks, 0.0, 1.0, "exact", unwanted=unwanted, neutral=neutral, what=what, board=board,
                             method=SafeDenoiser.method, strength=strength)
            banks = banks | {"bank": None}  # the pictures are those of the first
        return io.NodeOutput(model)


NODES = [KeepOut]
