"""It must learn, and it must not cheat."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from running import REPOSITORY, environment, result_of, run_llm, small_config

from llm.data.bigram import Bigram
from llm.data.document_reader import read_documents
from llm.data.manifest import read_manifest, write_manifest
from llm.data.shards import Loader, ShardWriter
from llm.data.tokenizer import load_tokenizer
from llm.tools.quickstart import Paths, split

TOKENS = 1_000_000


@pytest.fixture(scope="module")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """The quickstart's text and model, trained on a million tokens."""
    folder = tmp_path_factory.mktemp("learning")
    paths = Paths(folder / "data", folder / "artifacts")
    run_llm("corpus", "--source", "stdlib", "--output", paths.corpus)
    split(paths)
    prefix = paths.tokenizer.with_suffix("")
    run_llm("train_tokenizer", "--input", paths.train_text, "--model_prefix", prefix, "--vocab_size", 4096)
    prepare = ["--input", paths.train_text, "--tok", paths.tokenizer, "--out_dir", paths.shards]
    run_llm("prepare_data", *prepare, "--seq_len", 512, "--val_fraction", 0.01)
    overrides = [f"data.path={paths.shards}", f"checkpoint.dir={paths.run}", f"train.total_tokens={TOKENS}"]
    all_cores = environment() | {"OMP_NUM_THREADS": str(os.cpu_count())}
    run_llm(
        "train",
        "--config",
        REPOSITORY / "configs/tiny.json",
        *overrides,
        "train.eval_tokens=10_000",
        "train.precision=fp32",
        env=all_cores,
    )
    return paths


@pytest.mark.slow
def test_a_million_tokens_beat_a_bigram_model_that_saw_the_same(quickstart_run: Paths, tmp_path: Path) -> None:
    paths, held_out = quickstart_run, tmp_path / "held_out.jsonl"
    lines = paths.held_out.read_text("utf-8").splitlines(keepends=True)
    held_out.write_text("".join(line for line in lines if len(line) < 20_000), "utf-8")
    texts = [document.text for document in read_documents([held_out])]
    trained = result_of(run_llm("eval", "--ckpt", paths.run, "--input", held_out, "--json"))
    assert trained["documents"] == len(texts) > 5

    manifest = read_manifest(paths.shards)
    state = json.loads((paths.run / "latest/state.json").read_text())
    with Loader(
        manifest,
        "train",
        seq_len=state["data"]["seq_len"],
        seed=state["data"]["seed"],
        global_batch=8,
        micro_batch=8,
        end=state["data"]["position"],
    ) as seen:
        bigram = Bigram(((batch.input_ids.numpy(), batch.labels.numpy()) for batch in seen), manifest.vocab_size)
    mark = bigram.score(load_tokenizer(paths.tokenizer), texts)
    assert mark.text_bytes == trained["bytes"]
    assert trained["bits_per_byte"] < mark.bits_per_byte


@pytest.mark.slow  # test_model has it for a fixed batch
def test_nothing_is_learnt_from_random_tokens(
    llm_here: Callable[..., tuple[int, str, str]], small_tokenizer: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(small_tokenizer)
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copyfile(small_tokenizer, shards / "tokenizer.model")
    generator = np.random.default_rng(0)
    written = {}
    for name, tokens in (("train", 200_000), ("val", 40_000)):
        with ShardWriter(
            shards / f"{name}-00000.bin", vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
        ) as writer:
            ids = generator.integers(0, tokenizer.vocab_size, tokens, dtype=np.int32)
            writer.append(ids, np.arange(0, tokens, 1_000, dtype=np.uint64))
            written[name] = [writer.finish()]
    write_manifest(
        shards,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        seq_len=64,
        packing={},
        shards=written,
        counters={},
    )
    tree = small_config(shards, tmp_path / "run", train__total_tokens=400 * 512)
    tree["train"]["eval_tokens"] = None
    (tmp_path / "config.json").write_text(json.dumps(tree))
    code, out, err = llm_here("train", "--config", tmp_path / "config.json", "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["val_loss"] > math.log(tokenizer.vocab_size) - 0.01
    assert result["val_loss"] < math.log(tokenizer.vocab_size) + 0.2  # it was trained, not blown up
