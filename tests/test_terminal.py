"""Terminal output: escaping, progress bars and write errors."""

import io

import pytest
from tqdm import tqdm

from x3d_tf.files import WriteError
from x3d_tf.terminal import OutputClosed, Terminal, one_line, printable, progress_bar

HOSTILE = "a\x1b[2J\x07\r\x9b\x7fb\u202ec\u2066\udc80"
ESCAPED = r"a\x1b[2J\x07\r\x9b\x7fb\u202ec\u2066\udc80"


def test_control_characters_are_escaped() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("two\nlines\tand é, 走, العربية") == "two\nlines\tand é, 走, العربية"


def test_names_do_not_break_lines() -> None:
    assert one_line("a\nb\r\nc\u2028d") == r"a\nb\r\nc\u2028d"


def test_printed_text_is_escaped() -> None:
    stream = io.StringIO()
    print(HOSTILE, file=Terminal(stream))  # type: ignore[arg-type]
    assert stream.getvalue() == ESCAPED + "\n"


def test_a_progress_bar_is_one_line() -> None:
    stream = io.StringIO()
    with tqdm(total=2, desc="a\nb\x1b]0;c", file=Terminal(stream, bars=True)) as bar:  # type: ignore[arg-type]
        bar.update(2)
    shown = stream.getvalue()
    assert shown.startswith("\ra\\nb\\x1b]0;c: ") and shown.endswith("\n")
    assert shown.count("\n") == 1 and "\x1b" not in shown


@pytest.mark.parametrize(("total", "words"), [(1, "a{b}: 0/1 clip |"), (10, "a{b}: 0/10 clips |")])
def test_a_progress_bar_names_its_items(total: int, words: str) -> None:
    stream = io.StringIO()
    with progress_bar(total, "clip", "a{b}", file=stream):
        assert words in stream.getvalue()


class _Broken(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_a_full_disk_and_a_closed_output_raise_their_own_errors() -> None:
    with pytest.raises(WriteError, match=r"^standard output cannot be written: No space left on device$"):
        Terminal(_Broken(OSError(28, "No space left on device"))).write("a")
    with pytest.raises(OutputClosed):
        Terminal(_Broken(BrokenPipeError(32, "Broken pipe"))).write("a")
    assert Terminal(_Broken(OSError(28, "No space left on device")), bars=True).write("a") == 1
