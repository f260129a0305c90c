"""What the page shows of a run: the node's bar, and a text on the node that samples, see web/safe_denoiser.js."""
import sys
import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context

from ..safe_denoiser import Report
from ..safe_denoiser.gain import VERDICT
from ..safe_denoiser.report import live

SECONDS, BAR = 0.5, 0.05  # between two messages, of which each reads numbers from the device; and between two moves of a bar


def progress() -> Callable[[int, int], None]:
    """`progress(done, total)` for the core: moves the node's bar, and raises where the user interrupts."""
    bar, spoke = comfy.utils.ProgressBar(0), 0.0

    def tell(done: int, total: int) -> None:
        nonlocal spoke
        if done == total or time.monotonic() - spoke > BAR:  # thousands that are done already take no time to tell
            spoke = time.monotonic()
            bar.update_absolute(done, total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return tell


class Live:
    """Sends a line about the run to the node that samples, on the page that asked for it; without a server, a running workflow or a page it
    does nothing: what is sent to nobody in particular would be written into whatever workflow each open page shows.
    """

    def __init__(self):
        self.next, self.context = time.monotonic() + SECONDS, get_executing_context()
        self.server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)

    def send(self, text: str) -> None:
        if self.context is not None and self.server is not None and self.server.client_id is not None:
            message = {"node": self.context.node_id, "prompt_id": self.context.prompt_id, "text": text}
            self.server.send_sync("safe_denoiser.text", message, self.server.client_id)

    def show(self, steps: list) -> None:
        """Tell of the last step but one: its numbers are there already, so that reading them does not wait for the running step."""
        if len(steps) >= 2 and time.monotonic() >= self.next:
            self.next = time.monotonic() + SECONDS
            self.send(live(steps[-2], len(steps) - 1))

    def end(self, report: Report, on: bool) -> None:
        """Leave the verdict on the node, in lines as short as its text is wide."""
        verified = "".join(f"\n{note}" for note in report.notes if note.startswith(VERDICT))
        self.send(report.verdict.replace(", ", "\n", 2) + verified if on else "off: strength is 0")
