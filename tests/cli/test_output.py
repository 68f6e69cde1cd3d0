import io
import sys

import pytest

from sklora.cli._output import printable, result, say, table, with_options


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢", "plain é 漢"),
        ("é\x1b[2J", "é\\x1b[2J"),
        ("a\rb\n", "a\\rb\\n"),
        ("\u202egnp", "\\u202egnp"),
        ("\udcff", "\\udcff"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_letters_that_the_stream_lacks_are_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    result("é")
    assert sys.stdout.getvalue() == "\\xe9\n"


def test_say_escapes_and_names_options(capsys):
    say("pass on_base_model='ignore'\x07")
    assert capsys.readouterr() == ("", "sklora: pass --allow-other-base-model\\x07\n")


@pytest.mark.parametrize(
    ("message", "option"),
    [
        ("pass scale=, the factor", "pass --scale, the factor"),
        ("pass allow_torch_zip=True, which", "pass --allow-torch-zip, which"),
        ("pass names='raw' to keep", "pass --names raw to keep"),
        ("pass lokr='kronecker' to", "pass --lokr kronecker to"),
        ("pass on_extra='ignore'", "pass --allow-other-modules"),
        ("pass on_missing='zero'", "pass --allow-other-modules"),
        ("pass keys=('...{module}...', ...)", "pass --keys '...{module}...' '...{module}...'"),
        ("use LoRACollection.open.", "sklora fit and sklora compare take it."),
        ("nothing to see", "nothing to see"),
    ],
)
def test_with_options(message, option):
    assert with_options(message) == option


def test_table(capsys):
    table([("name", "n"), ("a\tb", "1"), ("c", "100")], "<>")
    assert capsys.readouterr().out == "name    n\na\\tb    1\nc     100\n"
    table([("n", "name"), ("1", "a")], "><")
    assert capsys.readouterr().out == "n  name\n1  a\n"  # without spaces at the ends of lines


def test_columns_are_as_wide_as_they_look(capsys):
    table([("n", "m"), ("漢字", "1"), ("Ａ", "2"), ("e\u0301", "30")], "<>")
    assert capsys.readouterr().out == "n      m\n漢字   1\nＡ     2\ne\u0301     30\n"
