"""Progress bars on standard error, for work that takes longer than a breath."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["byte_bar", "loading_bar", "status_line", "token_bar", "work_bar"]


@contextmanager
def loading_bar(show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for loading weights: call it with (bytes done, bytes in all). None when not shown."""
    with byte_bar(show, "packing weights") as update:
        yield update


@contextmanager
def byte_bar(show: bool, what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for work on bytes: call it with (bytes done, bytes in all). None when not shown."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def token_bar(show: bool, requests: int) -> Iterator[Callable[[int, int], None]]:
    """A bar for generation: call it with (new tokens, requests finished by them)."""
    if not show:
        yield lambda tokens, finished: None
        return
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=requests, speed="")
        start, total = time.perf_counter(), 0

        def advance(tokens: int, finished: int) -> None:
            nonlocal total
            total += tokens
            seconds = max(time.perf_counter() - start, 1e-9)
            progress.update(task, advance=finished, speed=f"{total / seconds:.1f} tok/s")

        yield advance


@contextmanager
def status_line(show: bool) -> Iterator[Callable[[str], None]]:
    """A line that says what is going on: call it with the text."""
    if not show:
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update


@contextmanager
def work_bar(show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for work in several parts: call it with (what is being done, how much of it, of how much)."""
    if not show:
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task, current = progress.add_task("starting", total=None), ""

        def advance(what: str, done: int, total: int) -> None:
            nonlocal current
            if what != current:
                current = what
                progress.reset(task, description=what)
            progress.update(task, completed=done, total=total)

        yield advance
