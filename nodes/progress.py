"""What the page shows of a run: the node's bar, and a text on the node that steers or works, see web/safe_denoiser.js."""
import sys
import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context

from ..safe_denoiser import Report
from ..safe_denoiser.condition.gain import VERDICT
from ..safe_denoiser.sentence import during

SECONDS, BAR = 0.5, 0.05  # between two messages, of which each reads numbers from the device; and between two moves of a bar


def server():
    """ComfyUI's server; None: there is none, as in tests and scripts."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def progress(patience: float = 0.0) -> Callable[[int, int], None]:
    """`progress(done, total)` for the core: moves the node's bar, after so many seconds, and raises where the user interrupts."""
    bar, spoke, begins = comfy.utils.ProgressBar(0), 0.0, time.monotonic() + patience

    def tell(done: int, total: int) -> None:
        nonlocal spoke
        now = time.monotonic()
        if now >= begins and (done == total or now - spoke > BAR):  # thousands that are done already take no time to tell
            spoke = now
            bar.update_absolute(done, total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return tell


class Board:
    """The one text of the node that is running now, to which several may add a paragraph of their own: the patches that it makes of a
    model, which speak when somebody samples that. Each node has its own, so that none speaks for another.
    """

    def __init__(self):
        context = get_executing_context()
        self.node, self.paragraphs = context and context.node_id, {}


class Live:
    """Sends a text about the run to a node, on the page that asked for it; without a server, a running workflow or a page it does nothing:
    what is sent to nobody in particular would be written into whatever workflow each open page shows.

    Args:
        board: of the node that is told; None: the one that is running.
        author: whose paragraph of the board it is.
    """

    def __init__(self, board: Board | None = None, author=None):
        self.next, self.context = time.monotonic() + SECONDS, get_executing_context()
        self.board, self.author = board, author
        self.server = server()

    def send(self, text: str) -> None:
        if self.board:
            self.board.paragraphs[self.author] = text
            lines = (line for paragraph in self.board.paragraphs.values() for line in paragraph.splitlines())
            text = "\n".join(dict.fromkeys(lines))  # what all say is said once
        if self.context is not None and self.server is not None and self.server.client_id is not None:
            node = self.board and self.board.node or self.context.node_id
            message = {"node": node, "prompt_id": self.context.prompt_id, "text": text}
            self.server.send_sync("safe_denoiser.text", message, self.server.client_id)

    def show(self, steps: list, what: str) -> None:
        """Tell of the last step but one: its numbers are there already, so that reading them does not wait for the running step."""
        if len(steps) >= 2 and time.monotonic() >= self.next:
            self.next = time.monotonic() + SECONDS
            self.send(during(steps[-2], what))

    def end(self, report: Report, on: bool, finished: bool = True) -> None:
        """Leave on the node what was done, what was found out about the condition, and what makes the set-up weak."""
        verified = [note for note in report.notes if note.startswith(VERDICT)]
        off = "off: strength is 0" if finished else "stopped"
        self.send("\n".join([report.sentence, *verified, *report.weak]) if on else off)
