"""The pack's wire types."""
from comfy_api.latest import io

CATEGORY = "safe denoiser"

NegationSetType = io.Custom("NEGATION_SET")
NegationBankType = io.Custom("NEGATION_BANK")
ReportType = io.Custom("SAFE_DENOISER_REPORT")
ClipType = io.Custom("OPEN_CLIP")
CheckedType = io.Custom("CHECKED_IMAGES")
SemanticType = io.Custom("SEMANTIC_POSTERIOR")


def _known(**fields) -> dict:
    """Those fields of a schema that this ComfyUI has."""
    return {key: value for key, value in fields.items() if key in io.Schema.__dataclass_fields__}


PREVIEWS = _known(has_intermediate_output=True)  # of a node that shows something and is no output: kept when the page is loaded again


def found_by(*words: str, essential: str | None = None) -> dict:
    """Other words by which the page's search finds a node, and its place among the essentials."""
    return _known(search_aliases=[*words], essentials_category=essential)
