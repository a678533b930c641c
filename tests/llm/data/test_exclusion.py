"""`llm prepare_data --exclude`: no document that shares a run of words with an evaluation text is in the shards."""

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loader import unpack_shard
from running import run_llm

from llm.data import blocks as limits
from llm.data import exclusion as module
from llm.data.exclusion import hash_runs, hash_words, read_exclusion
from llm.data.manifest import read_manifest
from llm.data.packing import new_digest
from llm.data.prepare import prepare_data
from llm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llm.errors import UserError

SOME = "the cat sat on a mat and purred while it ate some fish or what was left of them by dogs"
WORDS = SOME.split()
QUESTION = "Which of these animals would, in 1999, have eaten the most fish if it had been left alone by dogs?"


def sentences(seed: int, words: int) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text(sentences(0, 5000))
    return load_tokenizer(train_tokenizer([folder / "a.txt"], folder / "spm", 300)["model"])


def run(inputs: list[Path], tok: Tokenizer, out_dir: Path, **options: Any) -> dict[str, Any]:
    return prepare_data(
        inputs, tok.path, out_dir, **{"seq_len": 16, "shard_tokens": 1000, "workers": 1, "val_fraction": 0.1, **options}
    )


def texts_in(out_dir: Path, tok: Tokenizer) -> list[str]:
    """The documents of the shards, those of validation last."""
    ids: list[int] = []
    for part in ("train", "val"):
        for shard in read_manifest(out_dir).shards[part]:
            ids += unpack_shard((out_dir / shard.file).read_bytes())[0].tolist()
    begins = [i for i, token in enumerate(ids) if token == tok.bos_id]
    return [tok.decode(ids[begin + 1 : end - 1]) for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def digest(text: str) -> str:
    return new_digest(text.encode()).hexdigest()


def words_of(text: str) -> list[str]:
    """Words by the definition: letters and digits in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


TEXTS = st.text(st.sampled_from("ab cB.-_\n'’é É“世1　"), max_size=60)


@given(one=TEXTS, other=TEXTS, ngram=st.integers(1, 4), part=st.integers(1, 20))
@settings(deadline=None, max_examples=300)
def test_two_texts_share_a_hash_exactly_if_they_share_a_run_of_words(
    one: str, other: str, ngram: int, part: int
) -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = words_of(text)
        return {tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PART_BYTES", part)
        found = [hash_runs(hash_words(text.encode()), ngram).tolist() for text in (one, other)]
    assert len(set(found[0]) & set(found[1])) == len(runs(one) & runs(other))
    assert len(set(found[0])) == len(runs(one))


def test_a_document_with_a_run_is_left_out_counted_and_listed(tok: Tokenizer, tmp_path: Path) -> None:
    texts = [sentences(seed, 40) for seed in range(1, 301)]
    words = re.findall(r"\w+", QUESTION)
    quoted = " -- ".join(words[2:15]).upper()  # 13 words, with other marks between them
    texts[7] += f"\n{quoted}! And so on."
    texts[250] = f"{QUESTION} {texts[250]}"
    texts[90] += " " + " ".join(words[2:14])  # 12 words
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "eval.txt").write_text(f"Some other question.\n{QUESTION}\n")
    results = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        results.append(run([path], tok, out, exclude=[tmp_path / "eval.txt"], workers=workers))
        assert sorted(texts_in(out, tok)) == sorted(text for i, text in enumerate(texts) if i not in (7, 250))
        assert (out / "excluded.txt").read_text().split() == [digest(texts[7]), digest(texts[250])]
    assert results[0]["dropped"] == {"excluded": 2}
    assert results[0]["documents"] == 298
    assert results[1] == results[0] | {"out_dir": str(tmp_path / "out2")}
    # The text itself is what is hashed, as docs/data.md says.
    assert hashlib.blake2b(texts[7].encode(), digest_size=16, person=b"llm dedup").hexdigest() == digest(texts[7])
    # A shorter run is shared by more.
    fewer = run([path], tok, tmp_path / "out2", exclude=[tmp_path / "eval.txt"], ngram=12)
    assert fewer["dropped"] == {"excluded": 3}
    assert fewer["dataset_hash"] != results[0]["dataset_hash"]
    # Without the flag, the list goes with the shards that it was about.
    everything = run([path], tok, tmp_path / "out2")
    assert everything["dropped"] == {}
    assert not (tmp_path / "out2" / "excluded.txt").exists()


def test_the_hash_of_the_data_set_covers_what_was_excluded_and_the_same_again_is_left_as_it_is(
    tok: Tokenizer, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [sentences(seed, 40) for seed in range(1, 301)])
    hashes = [run([path], tok, tmp_path / "out")["dataset_hash"]]
    for question in (QUESTION, QUESTION.upper(), f"{QUESTION} Or not?"):
        (tmp_path / "eval.txt").write_text(question)
        for reused in (hashes and question == QUESTION.upper(), True):
            result = run([path], tok, tmp_path / "out", exclude=[tmp_path / "eval.txt"])
            assert result["reused"] == bool(reused)
        hashes.append(result["dataset_hash"])
    assert hashes[1] == hashes[2]  # the same words
    assert len(set(hashes)) == 3
    assert (tmp_path / "out" / "excluded.txt").read_text() == ""
    (tmp_path / "out" / "excluded.txt").unlink()
    assert not run([path], tok, tmp_path / "out", exclude=[tmp_path / "eval.txt"])["reused"]


@pytest.mark.parametrize("count", [250, 20], ids=["split by hash", "split by position"])
def test_a_run_is_found_wherever_a_long_document_is_cut(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    words = words_of(QUESTION)
    with_run = " ".join([sentences(1, 60), *words, sentences(2, 60)])
    without = " ".join([sentences(3, 60), *words[:9], "but", *words[9:], sentences(4, 60)])
    texts = [*(sentences(seed, 20) for seed in range(10, count)), with_run, without, with_run]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "eval.txt").write_text(QUESTION)
    for chars in (3, 20, 70, 1 << 18):
        monkeypatch.setattr(limits, "CHUNK_CHARS", chars)
        monkeypatch.setattr(limits, "BLOCK_BYTES", 2 * chars)
        out = tmp_path / f"out{chars}"
        result = run([path], tok, out, exclude=[tmp_path / "eval.txt"], dedup="exact")
        assert result["dropped"] == {"excluded": 2}
        assert (out / "excluded.txt").read_text().split() == [digest(with_run)] * 2
        assert result["documents"] == len(texts) - 2


def test_a_run_that_was_stopped_goes_on_with_its_list(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm.data import packing, spool

    texts = [sentences(seed, 40) + (f" {QUESTION}" if seed % 20 == 0 else "") for seed in range(1, 301)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "eval.txt").write_text(QUESTION)
    monkeypatch.setattr(limits, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(packing, "GROUP_BYTES", 1000)
    options = {"exclude": [tmp_path / "eval.txt"], "val_fraction": 0.2}
    run([path], tok, tmp_path / "whole", **options)
    save, left = spool.Store._save, iter(range(4))

    def stop(store: spool.Store) -> None:
        save(store)
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(spool.Store, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        run([path], tok, tmp_path / "out", **options)
    monkeypatch.setattr(spool.Store, "_save", save)
    with pytest.raises(UserError, match="holds an interrupted run of other input or settings"):
        run([path], tok, tmp_path / "out", val_fraction=0.2)
    run([path], tok, tmp_path / "out", **options)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert len((tmp_path / "out" / "excluded.txt").read_text().split()) == 15


class TestEvaluationTexts:
    @pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet", "arrow", "csv"])
    def test_every_string_of_a_record_is_one(self, tmp_path: Path, kind: str) -> None:
        text = 'Ä cat, of the kind\nthat "eats"'
        record = {"id": 3, "q": {"stem": QUESTION}, "choices": [{"label": "A", "text": text}]}
        path = tmp_path / f"eval.{kind}"
        if kind in ("txt", "csv"):
            path.write_text(f"{QUESTION}\n{text}")
        elif kind in ("jsonl", "json"):
            path.write_text(json.dumps(record) + "\n" if kind == "jsonl" else json.dumps([record], indent=1))
        else:
            table = pa.Table.from_pylist([record])
            if kind == "parquet":
                pq.write_table(table, path)
            else:
                with pa.ipc.new_stream(path, table.schema) as writer:
                    writer.write_table(table)
        exclusion, lines = read_exclusion([path], 7)
        for text in (QUESTION, "a cat, of the kind that eats".replace("a", "Ä", 1)):
            assert exclusion.finds(hash_words(text.encode()))
        assert not exclusion.finds(hash_words(b"a cat of the kind that eats"))
        assert re.fullmatch(r"--exclude: [\d,]+ different runs, [\d,]+ bytes in each process", lines[-1])
        if kind not in ("txt", "csv"):
            assert "3 evaluation texts, 15 runs of 7 words; shorter than a run, so that they exclude" in lines[0]

    def test_a_task_of_the_harness(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("lm_eval")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (tmp_path / "questions.jsonl").write_text(json.dumps({"q": QUESTION, "gold": 1}) + "\n")
        (tmp_path / "mine.yaml").write_text(
            f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/questions.jsonl\n"
            'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\n'
            "metric_list:\n  - metric: bits_per_byte\n"
        )
        exclusion, _ = read_exclusion([f"task:{tmp_path}/mine.yaml"], 13)
        assert exclusion.finds(hash_words(QUESTION.encode()))
        with pytest.raises(UserError, match=r"--exclude task:.*none.yaml: no such task"):
            read_exclusion([f"task:{tmp_path}/none.yaml"], 13)

    @pytest.mark.parametrize(
        ("content", "ngram", "said"),
        [
            ("only five words in here", 13, "no text has 13 words; lower --ngram"),
            ("", 13, "is empty; leave it out of --exclude"),
            ("x", 201, "--ngram 201: is 1 to 200"),
            ('{"q": "x"}\n{"q": ', 13, "the contents end inside a record"),
            ('{"q": "x"}\n{"q" "y"}\n', 13, "not JSON"),
        ],
    )
    def test_what_cannot_be_is_one_line(self, tmp_path: Path, content: str, ngram: int, said: str) -> None:
        path = tmp_path / ("eval.jsonl" if content.startswith("{") else "eval.txt")
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            read_exclusion([path], ngram)
        with pytest.raises(UserError, match="no such file"):
            read_exclusion([tmp_path / "missing.txt"], 13)


def test_a_length_of_runs_without_evaluation_texts_is_an_error(tok: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [QUESTION] * 5)
    with pytest.raises(UserError, match="--ngram 8: goes with --exclude"):
        run([path], tok, tmp_path / "out", ngram=8)


@pytest.mark.parametrize("runs", [1, 2, 4_095, 4_096, 5_000])
def test_memory_is_at_most_sixteen_bytes_a_run(tmp_path: Path, runs: int) -> None:
    (tmp_path / "eval.txt").write_text(" ".join(str(i) for i in range(runs + 12)))
    exclusion, lines = read_exclusion([tmp_path / "eval.txt"], 13)
    assert len(exclusion.runs) == runs
    size = int(re.findall(r"([\d,]+) bytes in each process", lines[-1])[0].replace(",", ""))
    assert 12 * runs <= size <= 16 * runs
    text = hash_words(" ".join(str(i) for i in range(runs + 12)).encode())
    assert all(exclusion.finds(text[i : i + 13]) for i in range(0, runs, max(1, runs // 50)))
    assert not exclusion.finds(text[::-1])


def test_the_program_shows_what_it_excludes(tok: Tokenizer, tmp_path: Path) -> None:
    texts = [sentences(seed, 40) for seed in range(1, 301)]
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, QUESTION])
    (tmp_path / "eval.txt").write_text(QUESTION)
    arguments = ("--tok", tok.path, "--seq_len", "16", "--val_fraction", "0.1", "--out_dir", tmp_path / "out")
    done = run_llm("prepare_data", "--input", path, *arguments, "--exclude", tmp_path / "eval.txt", "--ngram", "5")
    assert "eval.txt: 1 evaluation texts, 16 runs of 5 words" in done.stderr
    assert "(dropped: 1 excluded)" in done.stderr
