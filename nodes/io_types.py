"""The types of the pack's wires, and what all its nodes' schemas share."""
from comfy_api.latest import io
from comfy_execution.validation import validate_node_input

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


def wrong_wire(node: type[io.ComfyNode], received: dict[str, str | list]) -> bool | str:
    """What `validate_inputs` wants of the types that are connected: True, or what is wrong. Older ComfyUI refuses the lists of choices of
    nodes that select one (a sampler, a schedule), which its own KSampler takes.
    """
    for one in node.define_schema().inputs:
        found = received.get(one.id, one.get_io_type())
        if not (isinstance(found, list) and isinstance(one, io.Combo.Input)) and not validate_node_input(found, one.get_io_type()):
            return f"{one.id} takes {one.get_io_type()}, and {found} is connected"
    return True


PREVIEWS = _known(has_intermediate_output=True)  # of a node that shows something and is no output: kept when the page is loaded again

OWN_TEXT = [io.Hidden.unique_id]  # of a node that says what its patch does: with the same inputs another node is still another


def found_by(*words: str) -> dict:
    """Other words by which the page's search finds a node."""
    return _known(search_aliases=[*words])


def folded(*inputs: io.Input) -> tuple[io.Input, ...]:
    """Widgets that stay out of sight until somebody asks for them, where this ComfyUI can do that; the order of all is as it was."""
    for one in inputs:
        if hasattr(one, "advanced"):
            one.advanced = True
    return inputs
