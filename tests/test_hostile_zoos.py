"""Files under the name of a zoo that `LoRACollection.save` did not write."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sklora import _zoofile
from sklora.collection import LoRACollection, LoRALayout
from tests.test_zoofile import LAYOUT, adapters


@pytest.fixture
def path(tmp_path):
    return tmp_path / "zoo.safetensors"


def edited(path, edit):
    """Rewrite the header of a zoo; `edit` changes the decoded one in place."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = edit(header) or json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def with_layout(**changes):
    def edit(header):
        layout = json.loads(header["__metadata__"]["layout"])
        header["__metadata__"]["layout"] = json.dumps({**layout, **changes})

    return edit


def with_metadata(**changes):
    return lambda header: header["__metadata__"].update(changes)


def swapped(name, **changes):
    return lambda header: header[name].update(changes)


def twice(name, header):
    return f"{json.dumps(header)[:-1]}, {json.dumps({name: header[name]})[1:]}".encode()


class TestHostileFiles:
    @pytest.fixture
    def zoo(self, path):
        adapters().save(path)
        return path

    @pytest.mark.parametrize("size", [0, 5, 8, 100, -1, -200])
    def test_cut_off(self, zoo, size):
        zoo.write_bytes(zoo.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"zoo.safetensors is damaged.*io\.read_adapters"):
            LoRACollection.open(zoo)

    def test_a_header_that_is_longer_than_any(self, zoo):
        zoo.write_bytes(b"\xff" * 8 + zoo.read_bytes()[8:])
        with pytest.raises(ValueError, match="is damaged"):
            LoRACollection.open(zoo)

    def test_a_single_adapter(self, path):
        save_file({"q.lora_A.weight": np.ones((2, 3))}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"no zoo .* single adapter.* sklora\.io\.read_ad"):
            LoRACollection.open(path)
        save_file({"q.lora_A.weight": np.ones((2, 3))}, path)
        with pytest.raises(ValueError, match="no zoo"):
            LoRACollection.open(path)

    def test_headers_of_very_many_texts_are_not_parsed(self, zoo, monkeypatch):
        def with_texts(header):
            header["__metadata__"] |= {f"{number}\\": "" for number in range(40)}

        edited(zoo, with_texts)
        monkeypatch.setattr(_zoofile, "_MAX_QUOTES", 100)
        monkeypatch.setattr(_zoofile, "safe_open", None)
        monkeypatch.setattr(_zoofile, "parse_json", None)
        with pytest.raises(ValueError, match="its header has 164 quotes, of at most 100"):
            LoRACollection.open(zoo)

    def test_another_version(self, zoo):
        edited(zoo, with_metadata(version="2"))
        with pytest.raises(ValueError, match=r"version '2', .* reads version 1; upgrade sklora"):
            LoRACollection.open(zoo)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (with_metadata(layout="{"), "Expecting property name"),
            (with_metadata(layout="[" * 100_000), "nested too deeply"),
            (with_metadata(layout="3"), "the layout in its metadata is '3'"),
            (with_metadata(layout="[]"), r"the layout in its metadata is '\[\]'"),
            (with_metadata(layout=""), "Expecting value"),
            (lambda header: header["__metadata__"].pop("layout")[:0], "Expecting value"),
            (with_metadata(layout='{"modules": [], "side": []}'), "the layout in its metadata is"),
            (with_metadata(layout='{"a": 1, "a": 2}'), "names .a. twice"),
            (with_layout(base_model=3), r"base_model is 3, which is no string\. Copy"),
            (with_layout(modules=[]), "at least one module"),
            (with_layout(modules=3), "not iterable"),
            (with_layout(modules=[["q", 3, 2]]), "described by"),
            (with_layout(modules=[["q", 3, 2, -2]]), "at least 1, got -2"),
            (with_layout(modules=[["q", 3, 2, 1.0]]), "must be an integer"),
            (with_layout(side=[["scale", 10**30]]), "weights has dtype F32"),
            (with_layout(side=[]), r"weights .* shape \(7, 17\), but .*\(7, 14\) are expected"),
            (with_layout(has_plain_rows=True), "which is no plain row"),
            (
                with_layout(modules=[["q", 17, 1, 1]], side=[], has_plain_rows=True),
                "which is no plain row",
            ),
            (swapped("weights", dtype="I32"), "weights has dtype I32"),
            (swapped("weights", shape=[17, 7]), r"weights has dtype F32 and shape \(17, 7\)"),
            (swapped("weights", shape=[119]), r"shape \(119,\)"),
            (swapped("weights", shape=[]), "damaged"),
            (swapped("weights", data_offsets=[0, 10**9]), "damaged"),
            (swapped("weights", data_offsets=[8, 484]), "damaged"),
            (swapped("ranks", dtype="F32"), "ranks has dtype F32"),
            (swapped("ranks", shape=[2, 7]), r"ranks has dtype I32 and shape \(2, 7\)"),
            (swapped("ids", dtype="I8"), "ids has dtype I8"),
            (swapped("ids", shape=[1, 21]), r"ids has dtype U8 and shape \(1, 21\)"),
            (lambda header: header.update(more=header.pop("ids")), "it has the tensors"),
            (lambda header: b'{"a": 1, "a": 1}', "damaged"),
            (lambda header: b"[]", "damaged"),
            (lambda header: header.update(__metadata__=None), "no zoo that"),
            (lambda header: twice("ids", header), "names 'ids' twice"),
            (lambda header: json.dumps(header).encode().replace(b'"ids"', b'"ranks"'), "damaged"),
        ],
    )
    def test_headers(self, zoo, edit, message):
        edited(zoo, edit)
        with pytest.raises(ValueError, match=rf"(?s)zoo.safetensors .*{message}"):
            LoRACollection.open(zoo)

    @pytest.mark.parametrize(
        "changes",
        [{"base_model": "sd"}, {"side": [["scale", 1]]}, {"modules": [["q", 4, 1, 1]]}],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_plain_row_with_what_rows_lack(self, path, changes):
        LoRACollection.from_array(np.ones((3, 4)), LoRALayout.rows(4)).save(path)
        edited(path, with_layout(**changes))
        with pytest.raises(ValueError, match="which is no plain row"):
            LoRACollection.open(path)

    def test_weights_without_axes(self, path):
        LoRACollection.from_array(np.ones((1, 1)), LoRALayout.rows(1)).save(path)
        edited(path, swapped("weights", shape=[]))
        with pytest.raises(ValueError, match=r"weights has dtype F64 and shape \(\)"):
            LoRACollection.open(path)

    def test_tensors_too_many(self, zoo):
        def add(header):
            end = header["ids"]["data_offsets"][1]
            header["more"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}

        edited(zoo, add)
        with pytest.raises(ValueError, match=r"it has the tensors .*'more'"):
            LoRACollection.open(zoo)

    @pytest.mark.parametrize("ranks", [[3, 1], [-1, 1]])
    def test_ranks_beyond_the_layout(self, zoo, ranks):
        data = zoo.read_bytes()
        old, new = (np.array(pair, "<i4").tobytes() for pair in ([2, 1], ranks))
        zoo.write_bytes(data.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"adapter 0 is said to have rank .* in module 'q'"):
            LoRACollection.open(zoo)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ("[0, 1, 2, 3, 4, 5]   ", "no list of 7"),
            ('{"a": [1, 2, 3, 4]}  ', "no list of 7"),
            ('"abcdefg"            ', "no list of 7"),
            ("[{},[],2,3,4,5,6]    ", "no list of 7, or neither"),
            ('[{"":[]},2,3,4,5,6,1]', "no list of 7, or neither"),
            ("[0, 1, 2, 3, 4, 5, 1.", "Expecting"),
            ("[0,1,2,3, 4, 5,  6.5]", "neither all integers nor all strings"),
            ('[0,1,2,3,4,5,   "6" ]', "neither all integers nor all strings"),
            ("[[0],1,2,3,4, 5, 600]", "neither all integers nor all strings"),
            ("[0,1,2,3,4,5,3E100  ]", "neither all integers nor all strings"),
        ],
    )
    def test_ids(self, zoo, ids, message):
        zoo.write_bytes(zoo.read_bytes().replace(b"[0, 1, 2, 3, 4, 5, 6]", ids.encode()))
        with pytest.raises(ValueError, match=message):
            LoRACollection.open(zoo)

    def test_ids_with_brackets_and_quotes(self, zoo):
        ids = ['a["', "{b}", "[]", '\\"{', "", ",", "é]"]
        adapters(ids=ids).save(zoo)
        assert LoRACollection.open(zoo).ids.tolist() == ids

    @pytest.mark.timeout(30)
    @pytest.mark.parametrize("value", ["{}", "[]", '{"":0}'])
    def test_ids_that_are_no_ids_are_not_parsed(self, value):
        """They would take 20 to 30 times their bytes."""
        text = f"[{','.join([value] * 10**6)}]".encode()
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="no list of 7"):
                _zoofile._ids_from_json(text, 7)
            assert tracemalloc.get_traced_memory()[1] < len(text)
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("sizes", [(8, 6, 0), (8, 6)])
    def test_long_names_are_not_repeated_whole(self, zoo, sizes):
        module = ["q" * 10**5, *sizes]
        edited(zoo, with_layout(modules=[module]))
        with pytest.raises(ValueError, match="qqq") as error:
            LoRACollection.open(zoo)
        assert len(str(error.value)) < 1000

    def test_id_that_is_far_longer_than_the_others(self, zoo, monkeypatch):
        """Three megabytes of empty texts and one long one would take a gigabyte."""
        ids = ["a" * 1000, *"bcdefg"]
        adapters(ids=ids).save(zoo)
        assert LoRACollection.open(zoo).ids.tolist() == ids
        monkeypatch.setattr(_zoofile, "_ANY_ID_BYTES", 1000)
        monkeypatch.setattr(_zoofile, "_ID_BYTES_PER_LETTER", 8)
        with pytest.raises(ValueError, match="one is far longer than the others"):
            LoRACollection.open(zoo)
        assert len(_zoofile._checked_ids(["a" * 100] * 7)) == 7  # however long, if all are
        with pytest.raises(ValueError, match="make the collection with other ids="):
            adapters(ids=ids).save(zoo)

    def test_a_long_id_among_some_but_not_among_very_many(self):
        ids = ["a" * 5000, *[""] * 100]
        assert _zoofile._checked_ids(ids).tolist() == ids
        with pytest.raises(ValueError, match="one is far longer than the others"):
            _zoofile._checked_ids(ids * 100)

    def test_ids_that_would_fill_the_memory(self, zoo, monkeypatch):
        adapters(ids=["a" * 100, *"bcdefg"]).save(zoo)
        monkeypatch.setattr(_zoofile, "_MAX_ID_BYTES", 1000)
        with pytest.raises(ValueError, match="ids are too long"):
            LoRACollection.open(zoo)

    @given(
        st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4),
    )
    def test_damaged_bytes(self, tmp_path_factory, changes):
        path = tmp_path_factory.mktemp("zoos") / "zoo"
        adapters().save(path)
        data = bytearray(path.read_bytes())
        for place, value in changes:
            data[place % len(data)] = value
        path.write_bytes(data)
        try:
            X = LoRACollection.open(path)
        except ValueError:
            return
        assert X.read().shape == X.shape == (7, LAYOUT.width)
        assert (X.ranks <= LAYOUT.ranks).all()
        assert len(X.ids) == 7
