"""docs/chat.md as it stands, with a tiny model: fine-tuned on conversations it answers, stops, and leaves as GGUF."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from random_models import SHAPE, write_checkpoint
from running import REPOSITORY, run_llm

from llm.config import ModelConfig
from llm.data.tokenizer import load_tokenizer
from llm.model.transformer import Transformer

for package in ("trl", "peft", "datasets", "transformers"):
    pytest.importorskip(package, reason="docs/chat.md needs it: pip install trl peft")

pytestmark = pytest.mark.slow
ANSWERS = {"sum": "4 or so", "name": "def", "None": "return"}
LORA = "peft_config=LoraConfig(target_modules='all-linear', r=32, lora_alpha=64),"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (REPOSITORY / "docs/chat.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("lora", [False, True])
def test_the_page_from_export_to_gguf(small_tokenizer: Path, tmp_path: Path, lora: bool) -> None:
    tokenizer = load_tokenizer(small_tokenizer)
    weights = Transformer(ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size))
    weights.init_weights(1)
    ckpt = write_checkpoint(tmp_path / "artifacts", weights, tokenizer)
    ckpt.rename(tmp_path / "artifacts/checkpoints")
    (tmp_path / "data").mkdir()
    write_conversations(tmp_path, ANSWERS)
    for command in blocks("sh")[0].splitlines()[1:]:
        run_llm(*command.split()[1:], cwd=tmp_path)
    script, chat = blocks("python")
    script = script.replace('report_to="none",', 'report_to="none", use_cpu=True, logging_steps=5,')
    if lora:  # of a model that has learnt to read a question: LoRA leaves random weights as they are
        write_conversations(tmp_path, dict(zip(ANSWERS, ["x = 1", "4 or so", "def"], strict=True)))
        fine_tune(tmp_path, script)
        shutil.copy(tmp_path / "artifacts/chat/model.safetensors", tmp_path / "artifacts/export")
        shutil.rmtree(tmp_path / "artifacts/chat")
        write_conversations(tmp_path, ANSWERS)
        script = script.replace("    args=SFT", f"    {LORA}\n    args=SFT")
        script = script.replace("trainer.model.save", "trainer.model.merge_and_unload().save")
        script = "from peft import LoraConfig\n" + script
    losses = fine_tune(tmp_path, script)
    assert losses[-1] < losses[0] / 4

    done = subprocess.run(
        [sys.executable, "-c", chat.replace("What is 2 + 2?", "sum")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == ANSWERS["sum"], done.stderr[-2000:]  # it ends by EOS
    for command in blocks("sh")[2].splitlines():
        if command.startswith("llm"):
            run_llm(*command.split()[1:], cwd=tmp_path)
        elif command.startswith("cp"):
            subprocess.run(command.split(), cwd=tmp_path, check=True)
    prompt = "Question: name\nAnswer: "
    done = run_llm(
        "generate", "--ckpt", "artifacts/chat-imported", "--prompt", prompt, "--temperature", 0, "--json", cwd=tmp_path
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (result["text"], result["completions"][0]["finish"]) == (ANSWERS["name"], "eos")
    answers_as_llama_cpp(tmp_path / "artifacts/chat-gguf/model.gguf")


def write_conversations(folder: Path, answers: dict[str, str]) -> None:
    lines = [conversation(question, answer) for question, answer in answers.items()] * 40
    (folder / "data/conversations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def fine_tune(folder: Path, script: str) -> list[float]:
    """Runs the page's script; returns the losses on answers."""
    (folder / "sft.py").write_text(script)
    done = subprocess.run([sys.executable, "sft.py", "1e-2", "6"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"'loss': '?([\d.e-]+)", done.stdout)]


def conversation(question: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def answers_as_llama_cpp(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    template = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
    assert "'Question: '" in template
    try:
        import xllamacpp
    except ImportError:
        return
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 64, 1, False
    server = xllamacpp.Server(params)
    for question, answer in ANSWERS.items():
        asked = {"messages": conversation(question, answer)["messages"][:1], "temperature": 0, "max_tokens": 20}
        choice = server.handle_chat_completions(asked)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (answer, "stop")
