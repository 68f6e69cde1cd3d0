import numpy as np
import pytest

from sklora.cli._labels import Labels, Row, match, read_labels
from sklora.cli._output import CommandError
from sklora.cli._targets import make_targets


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(CommandError) as error:
        function(*arguments, **options)
    assert error.value.code == 2
    return str(error.value)


@pytest.fixture
def labels_file(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "labels.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


class TestReadLabels:
    def test_rows(self, labels_file):
        path = labels_file("path,y,run\na,1,r\n\nb,2,s\n")
        labels = read_labels(path, ["y"], groups="run")
        assert labels.rows == (Row(2, "a", ("1",), "r"), Row(4, "b", ("2",), "s"))

    def test_byte_order_mark_quotes_and_line_ends(self, labels_file):
        path = labels_file('\ufeffy,path\r\n1,"a, ""b"""\r\n'.encode())
        assert read_labels(path, ["y"]).rows == (Row(2, 'a, "b"', ("1",), None),)

    @pytest.mark.parametrize(
        ("header", "id"), [("y,id,path", "3"), ("y,id,other", "2"), (" other ,y", "1")]
    )
    def test_column_of_ids(self, labels_file, header, id):
        cells = dict(zip(header.split(","), "123", strict=False))
        path = labels_file(f"{header}\n{','.join(cells.values())}\n")
        assert read_labels(path, ["y"]).rows[0].id == id

    def test_spaces_around_cells_do_not_count(self, labels_file):
        path = labels_file("path, y ,run\n a , 1, r \n,,\n")
        labels = read_labels(path, ["y"], groups="run")
        assert labels.rows == (Row(2, "a", ("1",), "r"),)

    def test_spaces_around_names_of_columns_do_not_count(self, labels_file):
        path = labels_file("y , id , path \n1,2,3\n")
        assert read_labels(path, ["y"]).rows == (Row(2, "3", ("1",), None),)
        assert read_labels(path, ["y"], id="id").rows[0].id == "2"

    def test_targets_in_the_order_asked_for(self, labels_file):
        path = labels_file("path,x,y,z\na,1,2,3\n")
        labels = read_labels(path, ["z", "x", "y"])
        assert (labels.targets, labels.rows[0].targets) == (("z", "x", "y"), ("3", "1", "2"))

    @pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
    def test_name_that_holds_the_end_of_a_line(self, labels_file, end):
        path = labels_file(f'path,y\n"a{end}b",1\n')
        assert read_labels(path, ["y"]).rows[0].id == f"a{end}b"

    def test_column_of_ids_by_name(self, labels_file):
        path = labels_file("path,file,y\na,b,1\n")
        assert read_labels(path, ["y"], id="file").rows[0].id == "b"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is empty"),
            ("path,y\n", "has no rows"),
            ("path,z\na,1\n", "has no column 'y'; it has 'path', 'z'"),
            ("path,y,y\na,1,2\n", "has 2 columns 'y'"),
            ("path,y\na,1\nb,2,3\n", "line 3 has 3 cells, but there are 2 columns"),
            ("path;y\na;1\n", "it has 'path;y'; separate cells by commas."),
            ("path\na\n", "it has 'path'."),
            ("path|y\na|1\n", "it has 'path|y'; separate cells by commas."),
            ("path;,z\na,1\n", "it has 'path;', 'z'."),
            ("path\ty\na\t1\n", "it has 'path\\ty'; separate cells by commas."),
            ("path,y\na\n", "line 2 has 1 cell, but there are 2 columns"),
            ("path,y\na,1\nb, \n", "line 3 (b): column 'y' is empty"),
            ("path,y\nnan,1\nb,NaN\n", "line 3 (b): column 'y' is 'NaN'; fill it, or leave"),
            ("path,y\n,1\n", "line 2 (without a name): column 'path' is empty"),
            ('path,y\n"a\nb",1\nc,\n', "line 4 (c): column 'y' is empty"),
            ('path,y\na,"1\n', "line 2: unexpected end of data"),
            (b"path,y\n\xe9,1\n", "is not UTF-8"),
        ],
    )
    def test_refused(self, labels_file, text, message):
        assert message in refusal(read_labels, labels_file(text), ["y"])

    @pytest.mark.parametrize(("run", "what"), [("", "empty"), ("nan", "'nan'")])
    def test_empty_group(self, labels_file, run, what):
        path = labels_file(f"path,y,run\na,1,{run}\n")
        assert f"column 'run' is {what}" in refusal(read_labels, path, ["y"], groups="run")

    def test_no_file(self, tmp_path):
        assert "No such file" in refusal(read_labels, str(tmp_path / "no.csv"), ["y"])
        assert refusal(read_labels, str(tmp_path), ["y"]) == f"{tmp_path}: Is a directory."


def labels_of(*targets, ids=None):
    """Labels from columns of cells."""
    rows = [
        Row(line, (ids or "abcdefghij" * 10)[line - 2], cells, None)
        for line, cells in enumerate(zip(*targets, strict=True), 2)
    ]
    names = [f"t{place}" for place in range(len(targets))]
    return Labels("labels.csv", tuple(names), tuple(rows))


class TestMatch:
    def test_any_name(self):
        names = [["zoo/a/w", "zoo/a"], ["zoo/b/w", "zoo/b"]]
        labels = labels_of("12", ids=["./zoo//b/", "zoo/a/w"])
        assert match(labels, names) == [1, 0]

    def test_unknown(self):
        message = refusal(match, labels_of("1234", ids=["a", "x", "y", "z"]), [["a"], ["b"]])
        assert message == (
            "labels.csv: no adapter is called 'x' (line 3), 'y' (line 4), 'z' (line 5); "
            "there are 'a', 'b'. If another column names them, give --id."
        )

    def test_an_adapter_goes_by_its_shortest_name(self):
        message = refusal(match, labels_of("1", ids=["x"]), [["a/very/long/way", "z", "zoo/z"]])
        assert "there are 'z'." in message

    def test_spaces_around_names_and_how_accents_are_written_do_not_count(self):
        names = [["zoo/  lead", "  lead"], ["zoo/e\u0301", "e\u0301"]]
        assert match(labels_of("12", ids=["\xe9", "lead"]), names) == [1, 0]

    def test_two_names_that_are_one(self):
        assert match(labels_of("1", ids=["a"]), [["a", "./a"]]) == [0]

    def test_two_rows_of_one_adapter(self):
        message = refusal(match, labels_of("12", ids=["a", "zoo/a"]), [["zoo/a", "a"]])
        assert "line 3: 'zoo/a' is the adapter of line 2, too" in message

    def test_row_of_two_adapters(self):
        message = refusal(match, labels_of("1", ids=["a"]), [["one/a", "a"], ["b/a", "a"]])
        assert "line 2: 'a' may be any of one/a, b/a" in message


class TestMakeTargets:
    @pytest.mark.parametrize(
        ("cells", "task", "classes"),
        [
            ("xyx", "classification", ("x", "y")),
            ("121", "classification", (1, 2)),
            (("01", "1", "1"), "classification", ("01", "1")),
            (("1.0", "2.0", "2.0"), "classification", ("1.0", "2.0")),
            (("1", "2.5", "3"), "regression", None),
            (("1_0", "2.5", "2"), "classification", ("1_0", "2", "2.5")),
            ([*"0123456789"] * 3, "classification", tuple(range(10))),
            ([str(n) for n in range(20)], "classification", tuple(range(20))),
            ([str(n) for n in range(21)], "regression", None),
            (["a", *"0123456789" * 3], "classification", (*"0123456789", "a")),
            (["a", *map(str, range(10, 30))], "classification", (*map(str, range(10, 30)), "a")),
            (("9" * 19, "1", "1"), "classification", ("1", "9" * 19)),
            (("9" * 18, "1", "1"), "classification", (1, int("9" * 18))),
            (("-1", "0", "0"), "classification", (-1, 0)),
            (("-0", "0", "0"), "classification", ("-0", "0")),
        ],
    )  # fmt: skip
    def test_task(self, cells, task, classes):
        targets = make_targets(labels_of(cells), None)
        assert (targets.task, targets.classes) == (task, classes)
        assert targets.y.shape == (len(cells),)

    def test_task_as_asked(self):
        numbers = make_targets(labels_of("121"), "regression")
        assert numbers.y.tolist() == [1.0, 2.0, 1.0]
        assert numbers.describe() == "regression, 1 number"
        assert make_targets(labels_of(["0.5", "1"]), "classification").classes == ("0.5", "1")

    def test_text_among_numbers_as_asked(self):
        cells = [*map(str, range(21)), "NA"]
        assert len(make_targets(labels_of(cells), "classification").classes) == 22

    def test_many_labels(self):
        targets = make_targets(labels_of("010", ["1", "1.0", "0"]), None)
        assert targets.classes is None
        np.testing.assert_array_equal(targets.y, [[0, 1], [1, 1], [0, 0]])
        assert targets.describe() == "classification, 2 labels"

    def test_many_numbers(self):
        targets = make_targets(labels_of(["0.5", "1"], ["1", "2"]), None)
        np.testing.assert_array_equal(targets.y, [[0.5, 1], [1, 2]])
        assert targets.describe() == "regression, 2 numbers"

    @pytest.mark.parametrize(
        ("columns", "task", "message"),
        [
            (["111"], None, "all targets in column 't0' are '1'"),
            (["1x"], "regression", "line 3 (b): t0 is 'x', but regression needs"),
            (["12", "1x"], "regression", "line 3 (b): t1 is 'x', but regression needs"),
            ([["1.5", "nan"]], None, "line 3 (b): t0 is 'nan'"),
            ([["1.5", "inf"]], None, "line 3 (b): t0 is 'inf'"),
            (["01", "02"], None, "line 3 (b): t1 is '2', but several targets are labels"),
            (["01", "xy"], None, "line 2 (a): t1 is 'x', but several targets are labels"),
            ([[*map(str, range(21)), "NA"]], None, "line 23 (b): t0 is 'NA', among numbers; fill"),
            (["0" * 22, ["NA", *map(str, range(21))]], None, "line 2 (a): t1 is 'NA', among"),
        ],
    )
    def test_refused(self, columns, task, message):
        assert message in refusal(make_targets, labels_of(*columns), task)
