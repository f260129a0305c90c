"""The pack's wire types."""
from comfy_api.latest import io

CATEGORY = "safe denoiser"

NegationSetType = io.Custom("NEGATION_SET")
NegationBankType = io.Custom("NEGATION_BANK")
ReportType = io.Custom("SAFE_DENOISER_REPORT")
ClipType = io.Custom("OPEN_CLIP")
CheckedType = io.Custom("CHECKED_IMAGES")
SemanticType = io.Custom("SEMANTIC_POSTERIOR")
