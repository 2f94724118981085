"""Load the user's strategy file, and show the errors of its code with the user's frames only."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import traceback
from pathlib import Path

from backtest_kit.errors import BacktestKitError, UserError

_PACKAGE = str(Path(__file__).resolve().parents[1])


class StrategyFileFailed(Exception):
    """The user's own code raised; the message has only the frames of that code."""


def load_strategy_file(path: Path) -> None:
    """Run the file, so that what it registers is in the default kit.

    Raises:
        UserError: `path` is not a Python file.
        StrategyFileFailed: the file raised.
    """
    if path.is_dir() or path.suffix != ".py" or not path.exists():
        what = "is a directory" if path.is_dir() else "is not a .py file" if path.exists() else "does not exist"
        raise UserError(
            f"strategy file {path} {what}: give the Python file that calls backtest_kit.add_strategy_schema"
        )
    spec = importlib.util.spec_from_file_location("strategy_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"strategy file {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise StrategyFileFailed(_explain(error, f"strategy file {path} raised")) from error


def strategy_failure(error: BaseException, path: Path) -> Exception:
    """What to show for an error that ended a run: our errors as they are, the user's with the frames of that code."""
    if not isinstance(error, BacktestKitError):
        return StrategyFileFailed(_explain(error, f"strategy file {path} raised"))
    if error.__cause__ is not None and _own_frames(error.__cause__):
        return StrategyFileFailed(f"error: {error}\n{explained(error.__cause__)}")
    place = where(error)
    return type(error)(f"{error}{place}", outcome=error.outcome) if place else error


def where(error: BaseException) -> str:
    """The line of the user's code that raised, in brackets; empty if the error came from elsewhere."""
    own = _own_frames(error)
    return f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""


def _own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of the user's code: neither ours nor the interpreter's or an installed package's."""
    paths = sysconfig.get_paths()
    others = ("<frozen", _PACKAGE, *(paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")))
    return [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(others) and Path(frame.filename).is_file()
    ]


def _explain(error: BaseException, headline: str) -> str:
    return f"error: {headline} {type(error).__name__}\n{explained(error)}"


def explained(error: BaseException) -> str:
    """The error with the user's frames, after its cause or context."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    parts = [f"{explained(before)}\n\nand then:\n"] if before is not None else []
    frames = "".join(traceback.format_list(_own_frames(error)))
    parts.append(f"in your code:\n{frames}" if frames else "")
    parts += traceback.format_exception_only(error)
    if isinstance(error, BaseExceptionGroup):
        parts += [f"\n{explained(each)}" for each in error.exceptions]
    return "".join(parts).rstrip()
