"""A zoo of LoRAs of a language model, each finetuned on a random subset of question sources.

The recipe of Qwen2-ARC-LoRA in "Learning on LoRAs": LoRA on the key and value projections, one
source of questions that every adapter sees, some of the others, and hyperparameters that are drawn
anew for each adapter. How both are drawn is read off the list of the paper's adapters that its
authors publish, llm/metanet/hparams.csv of https://github.com/moeputt/LoL: of 19 sources, 1 to 19
are left out, each number as often.

Questions are lines of JSON as in the files of ARC (https://allenai.org/data/arc), nested or as
columns: "question", "choices", "answerKey", and "source" or an "id" that begins with the source, as
"Mercury_7175875" does. The model learns to continue "Question: ... Answer:" with the right choice.

Labels: `source:NAME` (1 if the adapter saw it), `subset` (all that it saw), `validation_loss` (per
token of the right answer), `test_accuracy` (share of questions whose right answer is the likeliest)
and all that was drawn. Many adapters see all sources but one, or none but that which all see: of
2,000, some 420 have siblings that saw the same questions, which `--groups subset` keeps together.

    python finetune_lm.py --model Qwen/Qwen2-1.5B --train ARC-Challenge-Train.jsonl \\
        --validation ARC-Challenge-Dev.jsonl --test ARC-Challenge-Test.jsonl \\
        --adapters 2000 --output zoo
    sklora compare zoo --labels zoo/labels.csv --target validation_loss --groups subset
"""

import argparse
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo_folder import DTYPES, LogUniform, add_arguments, fill, log_uniform

IGNORED = -100  # the label of tokens that are not predicted


class Question(NamedTuple):
    """`choices` are (tokens, labels), where the labels of the question's own tokens are ignored."""

    source: str
    choices: list
    answer: int

    @property
    def right(self):
        return self.choices[self.answer]


def read_questions(paths, tokenizer):
    # At "\n" alone: JSON may hold other ends of lines, such as U+2028, as they are.
    lines = [line for path in paths for line in path.read_text("utf-8").split("\n")]
    questions = [read_question(json.loads(line), tokenizer) for line in lines if line.strip()]
    if not questions:
        raise SystemExit(f"No questions in {', '.join(map(str, paths))}.")
    return questions


def read_question(row, tokenizer):
    stem, choices = row["question"], row.get("choices")
    if isinstance(stem, dict):
        stem, choices = stem["stem"], stem["choices"]
    if isinstance(choices, dict):
        names, texts = choices["label"], choices["text"]
    else:
        names, texts = zip(*((choice["label"], choice["text"]) for choice in choices), strict=True)
    source = row.get("source") or row["id"].split("_")[0]
    prompt = tokenizer(f"Question: {stem}\nAnswer:").input_ids
    answers = [tokenizer(f" {text}", add_special_tokens=False).input_ids for text in texts]
    encoded = [
        (torch.tensor(prompt + answer), torch.tensor([IGNORED] * len(prompt) + answer))
        for answer in answers
    ]
    return Question(source, encoded, list(names).index(row["answerKey"]))


def collate(examples, device):
    tokens, labels = zip(*examples, strict=True)
    batch = {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    return {name: value.to(device) for name, value in batch.items()}


def draw(rng, args, optional):
    """Draw the sources and the hyperparameters of one adapter."""
    # One at least is left out, unless there is only one.
    seen = rng.permutation(optional)[: rng.integers(max(2, len(optional)))]
    return {
        **{f"source:{source}": int(source in seen) for source in optional},
        "learning_rate": log_uniform(rng, *args.learning_rate),
        "weight_decay": log_uniform(rng, *args.weight_decay),
        "epochs": int(rng.integers(*args.epochs, endpoint=True)),
        "batch_size": int(rng.choice(args.batch_size)),
        "lora_dropout": rng.uniform(*args.lora_dropout),
    }


def train(model, examples, drawn):
    """Train the adapter; give the loss of every step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=drawn["learning_rate"], weight_decay=drawn["weight_decay"]
    )
    batches = DataLoader(
        examples,
        drawn["batch_size"],
        shuffle=True,
        collate_fn=partial(collate, device=model.device),
    )
    losses = []
    model.train()
    for _ in range(drawn["epochs"]):
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@torch.inference_mode()
def log_likelihoods(model, examples, batch_size):
    """Give the log-likelihood of each answer, summed over its tokens."""
    model.eval()
    sums = []
    for batch in DataLoader(examples, batch_size, collate_fn=partial(collate, device=model.device)):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float().transpose(1, 2)
        sums += (-F.cross_entropy(logits, labels, reduction="none").sum(dim=1)).tolist()
    return np.array(sums)


def validation_loss(model, questions, batch_size):
    examples = [question.right for question in questions]
    n_tokens = sum(int((labels != IGNORED).sum()) for _, labels in examples)
    return -log_likelihoods(model, examples, batch_size).sum() / n_tokens


def accuracy(model, questions, batch_size):
    examples = [example for question in questions for example in question.choices]
    ends = np.cumsum([len(question.choices) for question in questions])
    scores = np.split(log_likelihoods(model, examples, batch_size), ends[:-1])
    hits = [s.argmax() == q.answer for s, q in zip(scores, questions, strict=True)]
    return float(np.mean(hits))


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a causal language model: its name, or a folder")
    for name in ("--train", "--validation", "--test"):
        add(name, type=Path, nargs="+", required=True, metavar="JSONL")
    add("--adapters", type=int, default=100, help="how many; default: 100")
    add("--kept", metavar="SOURCE", help="every adapter sees it; default: the largest")
    add(
        "--target-modules",
        nargs="+",
        default=["k_proj", "v_proj"],
        metavar="NAME",
        help="default: k_proj v_proj",
    )
    ranges = parser.add_argument_group("drawn for each adapter")
    add = partial(ranges.add_argument, nargs=2, metavar=("LOW", "HIGH"))
    for name, low, high in (
        ("--learning-rate", "1e-5", "1e-3"),
        ("--weight-decay", "1e-6", "1e-2"),
    ):
        default = [float(low), float(high)]
        text = f"default: {low} {high}, log-uniform"
        add(name, type=float, default=default, action=LogUniform, help=text)
    add("--epochs", type=int, default=[2, 4], help="default: 2 4")
    add("--lora-dropout", type=float, default=[0.0, 0.1], help="default: 0 0.1")
    ranges.add_argument(
        "--batch-size", type=int, nargs="+", default=[32, 64, 128], help="default: 32 64 128"
    )
    parser.add_argument("--eval-batch-size", type=int, default=32)
    add_arguments(parser)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    training, validation, test = (
        read_questions(paths, tokenizer) for paths in (args.train, args.validation, args.test)
    )
    counts = Counter(question.source for question in training)
    args.kept = args.kept or counts.most_common(1)[0][0]
    if args.kept not in counts:
        raise SystemExit(f"--kept {args.kept}: the sources are {', '.join(sorted(counts))}.")
    optional = sorted(counts.keys() - {args.kept})
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    base.to(args.device)

    def make(index):
        rng = np.random.default_rng([args.seed, index])
        torch.manual_seed(int(rng.integers(2**62)))
        drawn = draw(rng, args, optional)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=args.rank,
            lora_alpha=args.alpha or args.rank,
            lora_dropout=drawn["lora_dropout"],
            target_modules=args.target_modules,
        )
        model = get_peft_model(base, config)
        seen = [q for q in training if q.source == args.kept or drawn[f"source:{q.source}"]]
        train(model, [question.right for question in seen], drawn)
        sources = [args.kept, *(source for source in optional if drawn[f"source:{source}"])]
        return model, {
            **drawn,
            "subset": "+".join(sources),
            "n_questions": len(seen),
            "validation_loss": validation_loss(model, validation, args.eval_batch_size),
            "test_accuracy": accuracy(model, test, args.eval_batch_size),
        }

    fill(args.output, {**vars(args), "sources": optional}, args.adapters, make)


if __name__ == "__main__":
    main()
