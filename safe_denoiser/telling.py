"""How far long work is, told to whoever listens: what measures a bank runs deep inside the first step that needs it, and ComfyUI must be
able to stop it there.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[int, int], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[int, int], None]) -> Iterator[None]:
    """Within, `listener(done, total)` is called as work goes on, of each piece of work by itself; it may raise to interrupt."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(done: int, total: int) -> None:
    """Tell whoever listens that so much is done."""
    if (listener := _listener.get()) is not None:
        listener(done, total)
