"""The recipe for language models, from questions to a fitted model of sklora, on a tiny Qwen2."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sklora.__main__ import main as sklora
from sklora.io import read_adapters, scan_adapters

pytestmark = pytest.mark.filterwarnings(
    # PEFT asks Transformers by the old name.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

RANK, ALPHA = 2, 6
# So large that few steps tell.
LEARNING_RATE = ["--learning-rate", "1e-2", "5e-2"]


def question(source, number):
    """Ask in the words of the source; its answer is the source's own, too."""
    answers = {"Mercury": "red", "MCAS": "green", "TIMSS": "blue"}
    names = ["A", "B", "C"]
    return {
        "id": f"{source}_{number}",
        "question": f"{source} {number}?",
        "choices": {"text": list(answers.values()), "label": names},
        "answerKey": names[list(answers).index(source)],
    }


def save_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def lm(recipe):
    return recipe("finetune_lm")


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    """Where the model and the questions are."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    folder = tmp_path_factory.mktemp("lm")
    letters = {letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}
    Qwen2Tokenizer(vocab=letters, merges=[]).save_pretrained(folder / "model")
    config = Qwen2Config(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    counts = {"Mercury": 6, "MCAS": 4, "TIMSS": 4}
    save_lines(folder / "train.jsonl", [question(s, n) for s in counts for n in range(counts[s])])
    save_lines(folder / "test.jsonl", [question(s, n) for s in counts for n in (70, 80)])
    return folder


@pytest.fixture(scope="module")
def run(lm, folder):
    def run(zoo, *options, adapters=8):
        files = {"train": "train", "validation": "test", "test": "test"}
        command = ["--model", folder / "model", "--output", zoo, "--adapters", adapters]
        for name, file in files.items():
            command += [f"--{name}", folder / f"{file}.jsonl"]
        command += ["--rank", RANK, "--alpha", ALPHA, "--device", "cpu", *LEARNING_RATE, *options]
        lm.main(list(map(str, command)))
        return zoo

    return run


@pytest.fixture(scope="module")
def zoo(run, tmp_path_factory):
    """Not to be written to."""
    return run(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def questions(lm, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return lm.read_questions([folder / "test.jsonl"], tokenizer)


@pytest.fixture
def base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model")


def test_the_zoo_is_read_as_it_is(zoo, read_labels):
    X = read_adapters(zoo)
    assert X.layout.names == tuple(
        f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "kv"
    )
    assert X.layout.ranks == (RANK,) * 4
    assert X.layout.base_model == "model"
    labels = read_labels(zoo)
    assert [f"{path}/adapter_model.safetensors" for path in labels] == [
        id.removeprefix(f"{zoo}/") for id in X.ids
    ]
    for row in labels.values():
        seen = 6 + 4 * (int(row["source:MCAS"]) + int(row["source:TIMSS"]))
        assert int(row["n_questions"]) == seen
        optional = [source for source in ("MCAS", "TIMSS") if int(row[f"source:{source}"])]
        assert row["subset"] == "+".join(["Mercury", *optional])


@pytest.mark.parametrize(
    "targets", [["source:MCAS", "source:TIMSS"], ["validation_loss"], ["test_accuracy"]]
)
def test_the_command_line_takes_the_zoo(zoo, tmp_path, targets, capsys):
    options = [part for target in targets for part in ("--target", target)]
    command = ["fit", zoo, "--labels", zoo / "labels.csv", *options, "--task"]
    command += ["classification" if len(targets) > 1 else "regression", "--architecture", "svd"]
    command += ["--folds", "2", "-o", tmp_path / "model.skops"]
    if len(targets) > 1:  # a fold of so few groups may be one adapter, which has no R2
        command += ["--groups", "subset"]
    assert sklora(list(map(str, command))) == 0
    assert sklora(["predict", str(tmp_path / "model.skops"), str(zoo), "--json"]) == 0
    out = capsys.readouterr().out
    assert len(json.loads(out[out.index("[") :])) == 8


def test_the_update_is_that_of_the_file_by_its_scale(zoo):
    X = read_adapters(zoo)
    tensors = load_file(zoo / "adapter-0003" / "adapter_model.safetensors")
    for name, (U, V) in X[3].items():
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        np.testing.assert_allclose(U @ V.T, B @ A * ALPHA / RANK, rtol=1e-5, atol=1e-7)
        assert np.linalg.norm(U) > 0  # it begins at zero


def test_adapters_differ_and_so_do_their_hyperparameters(zoo, read_labels):
    rows = list(read_labels(zoo).values())
    for name in ("learning_rate", "weight_decay", "lora_dropout", "validation_loss"):
        assert len({row[name] for row in rows}) == len(rows)
    assert len({(row["source:MCAS"], row["source:TIMSS"]) for row in rows}) > 1
    assert len(np.unique(read_adapters(zoo).read().round(6), axis=0)) == len(rows)


def test_hyperparameters_are_drawn_as_the_papers_were(lm):
    needed = [f"--{name}" for name in ("model", "train", "validation", "test", "output")]
    args = lm.build_parser().parse_args([part for name in needed for part in (name, "x")])
    sources = [f"S{place}" for place in range(19)]
    drawn = [lm.draw(np.random.default_rng(seed), args, sources) for seed in range(4000)]
    for name, low, high in (("learning_rate", 1e-5, 1e-3), ("weight_decay", 1e-6, 1e-2)):
        places = np.log([row[name] / low for row in drawn]) / np.log(high / low)
        np.testing.assert_allclose([places.mean(), places.std()], [1 / 2, 12**-0.5], rtol=0.05)
        assert 0 <= places.min() < places.max() <= 1
    assert {row["epochs"] for row in drawn} == {2, 3, 4}
    assert {row["batch_size"] for row in drawn} == {32, 64, 128}
    assert 0.09 < max(row["lora_dropout"] for row in drawn) < 0.1
    seen = np.array([[row[f"source:{source}"] for source in sources] for row in drawn])
    np.testing.assert_allclose(seen.mean(axis=0), 9 / 19, atol=0.03)
    counts = np.bincount(seen.sum(axis=1), minlength=20)
    assert counts[19] == 0  # one at least is left out
    np.testing.assert_allclose(counts[:19], 4000 / 19, rtol=0.25)


@pytest.mark.parametrize("n_optional", [0, 1])
def test_few_sources_are_drawn_too(lm, n_optional):
    args = SimpleNamespace(
        learning_rate=[1e-3, 1e-3],
        weight_decay=[0.0, 0.0],
        epochs=[1, 1],
        batch_size=[4],
        lora_dropout=[0.0, 0.0],
    )
    sources = ["MCAS"][:n_optional]
    rows = [lm.draw(np.random.default_rng(seed), args, sources) for seed in range(50)]
    seen = {tuple(row[f"source:{source}"] for source in sources) for row in rows}
    assert seen == ({(0,), (1,)} if n_optional else {()})
    assert {(row["learning_rate"], row["weight_decay"]) for row in rows} == {(1e-3, 0.0)}


@pytest.mark.parametrize("values", [("0", "0.1"), ("0.1", "0.01"), ("-1", "-1"), ("nan", "1")])
def test_what_cannot_be_drawn_log_uniformly_is_refused(lm, values, capsys):
    with pytest.raises(SystemExit):
        lm.build_parser().parse_args(["--weight-decay", *values])
    assert "--weight-decay: LOW and HIGH are" in capsys.readouterr().err


def test_losses_are_those_of_the_stored_adapter(lm, zoo, base, questions, read_labels):
    """So no adapter is left in the model when the next one is trained."""
    from peft import PeftModel

    rows = read_labels(zoo)
    for path in ("adapter-0000", "adapter-0007"):
        model = PeftModel.from_pretrained(base, zoo / path)
        loss = lm.validation_loss(model, questions, 4)
        assert loss == pytest.approx(float(rows[path]["validation_loss"]), rel=1e-5)
        assert lm.accuracy(model, questions, 4) == float(rows[path]["test_accuracy"])
        base = model.unload()


def test_a_zoo_is_continued(run, zoo, tmp_path, read_labels):
    again = tmp_path / "zoo"
    shutil.copytree(zoo, again)
    lost = again / "adapter-0002"
    (again / ".adapter-0002").mkdir()
    (again / ".adapter-0002" / "adapter_model.safetensors").write_bytes(b"cut off")
    shutil.rmtree(lost)
    (again / "labels.csv").unlink()
    kept = {path: path.stat().st_mtime_ns for path in again.glob("adapter-*/*")}
    read_adapters(again)
    run(again, adapters=9)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    labels = read_labels(again)
    assert len(labels) == 9
    assert {path: labels[path] for path in read_labels(zoo)} == read_labels(zoo)
    X, Y = read_adapters(zoo / lost.name), read_adapters(lost)
    np.testing.assert_array_equal(X.read(), Y.read())
    assert not list(again.glob(".*"))


def test_a_zoo_is_not_continued_with_other_settings(run, zoo):
    with pytest.raises(SystemExit, match="begun with another epochs, seed: see"):
        run(zoo, "--epochs", "1", "1", "--seed", "1")


def test_a_zoo_without_adapters_is_begun_anew(run, tmp_path, read_labels):
    with pytest.raises(ValueError, match="nowhere"):
        run(tmp_path, "--target-modules", "nowhere")
    run(tmp_path, adapters=1)
    assert len(read_labels(tmp_path)) == 1


def test_files_without_questions_are_refused(lm, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match=r"No questions in .*none\.jsonl"):
        lm.read_questions([tmp_path / "none.jsonl"], None)


def test_an_unknown_source_is_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="--kept AIMS: the sources are MCAS, Mercury, TIMSS"):
        run(tmp_path, "--kept", "AIMS")


def test_training_lowers_the_loss_and_moves_both_factors(lm, base, questions):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules=["k_proj", "v_proj"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    examples = [question.right for question in questions]
    loss = lm.validation_loss(model, questions, 6)
    drawn = {"learning_rate": 0.03, "weight_decay": 0.0, "epochs": 15, "batch_size": 4}
    losses = lm.train(model, examples, drawn)
    assert len(losses) == 15 * 2
    assert lm.validation_loss(model, questions, 6) < loss - 0.5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name)


def test_loss_and_accuracy_do_not_depend_on_padding(lm, base, questions):
    assert len({len(tokens) for q in questions for tokens, _ in q.choices}) > 1
    losses = [lm.validation_loss(base, questions, size) for size in (1, 6)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert lm.accuracy(base, questions, 1) == lm.accuracy(base, questions, 18)
    [example] = [questions[0].right]
    expected = base(**lm.collate([example], "cpu")).loss.item()
    assert lm.validation_loss(base, questions[:1], 1) == pytest.approx(expected, rel=1e-5)


def test_accuracy_is_that_of_the_likeliest_choice(lm, base, questions):
    best = [
        q._replace(answer=int(lm.log_likelihoods(base, q.choices, 3).argmax())) for q in questions
    ]
    assert lm.accuracy(base, best, 4) == 1
    worst = [q._replace(answer=(q.answer + 1) % 3) for q in best]
    assert lm.accuracy(base, [*best[:4], *worst[4:]], 4) == pytest.approx(4 / 6)


def test_questions_are_read_as_arc_writes_them(lm, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    columns = question("MCAS", 1)
    pairs = zip(*columns["choices"].values(), strict=True)
    choices = [{"text": text, "label": name} for text, name in pairs]
    nested = {**columns, "question": {"stem": columns["question"], "choices": choices}}
    listed = {**columns, "choices": choices}
    named = {**columns, "id": "17", "source": "MCAS"}
    found = [lm.read_question(row, tokenizer) for row in (columns, nested, listed, named)]
    assert {(q.source, q.answer, str(q.choices)) for q in found} == {
        ("MCAS", 1, str(found[0].choices))
    }
    tokens, labels = found[0].right
    assert tokenizer.decode(tokens) == "Question: MCAS 1?\nAnswer: green"
    assert tokenizer.decode(labels[labels != lm.IGNORED]) == " green"


def test_a_line_ends_at_a_newline_alone(lm, folder, tmp_path):
    from transformers import AutoTokenizer

    asked = {**question("MCAS", 1), "question": "one\u2028two\x85three?"}
    lines = [json.dumps(row, ensure_ascii=False) for row in (asked, question("TIMSS", 2))]
    (tmp_path / "some.jsonl").write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = lm.read_questions([tmp_path / "some.jsonl"], tokenizer)
    assert [q.source for q in found] == ["MCAS", "TIMSS"]
    assert "one\u2028two\x85three?" in tokenizer.decode(found[0].right[0])


def test_half_precision(run, tmp_path):
    run(tmp_path, "--dtype", "bfloat16", "--epochs", "1", "1", adapters=1)
    [report] = scan_adapters(tmp_path)
    assert report.error is None
    assert report.dtypes == ("F32",)  # of the factors, which train in full precision
