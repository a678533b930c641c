"""The decoder of GPUs: the tokens are the CPU's, and what is kept for the next request changes none of them.

On a CPU, a graph's replay is a call of what it would have captured; the tests marked gpu replay graphs.
"""

import copy
import gc
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from llm.config import ModelConfig
from llm.errors import UserError
from llm.inference import decode, device_decoder
from llm.inference.decode import generate_batch, greedy
from llm.inference.device_decoder import Workspace
from llm.inference.sampling import Sampling
from llm.model.transformer import MLP, Transformer

CONFIG = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=300, max_seq_len=48)
PROMPTS = ([3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4])
GREEDY, DRAWN = Sampling(temperature=0), Sampling(temperature=0.9, top_p=0.9, seed=4)


class Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decodes as on a GPU, 16 slots a graph; on a CPU without graphs, streams and pinned memory."""
    monkeypatch.setattr(device_decoder, "GRAPH_SLOTS", 16)
    if request.param == "cpu":
        monkeypatch.setattr(decode, "is_on_gpu", lambda model: True)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(Workspace, "replay", Workspace._compute)
    return str(request.param)


@pytest.fixture
def model(device: str) -> Transformer:
    return make(device)


def make(device: str, **changes: object) -> Transformer:
    model = Transformer(CONFIG.model_copy(update=changes))
    model.init_weights(5)
    with torch.no_grad():
        model.lm_head.weight *= 8  # a random model's choices are near ties without this
    return model.to(device).eval()


def tokens(
    model: Transformer, prompts=PROMPTS, sampling: Sampling = GREEDY, new: int = 20, **options
) -> list[list[int]]:
    sequences: list[list[int]] = [[] for _ in prompts]
    for token in generate_batch(model, prompts, max_new_tokens=new, sampling=sampling, **options):
        sequences[token.sequence].append(token.id)
    return sequences


def kept(model: Transformer) -> Workspace:
    return device_decoder._kept[model][1]


def test_greedy_tokens_are_those_of_whole_passes(model: Transformer) -> None:
    assert tokens(model) == greedy(model, PROMPTS, 20)


@pytest.mark.parametrize("window", [1, 5, 17])
def test_with_a_sliding_window_too(device: str, window: int) -> None:
    model = make(device, sliding_window=window)
    assert tokens(model) == greedy(model, PROMPTS, 20)


@pytest.mark.parametrize("sampling", [DRAWN, Sampling(top_k=7, seed=1), Sampling(min_p=0.1), Sampling(temperature=2.0)])
def test_a_seed_gives_the_same_text_in_every_batch_and_on_the_cpu(
    model: Transformer, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = tokens(model, sampling=sampling)
    assert together == [tokens(model, [prompt], sampling)[0] for prompt in PROMPTS]
    assert together == tokens(model, [*PROMPTS, *[[1]] * 12], sampling)[:4]
    monkeypatch.setattr(decode, "is_on_gpu", lambda model: False)
    assert together == tokens(copy.deepcopy(model).cpu(), sampling=sampling)


def test_a_repetition_penalty_chooses_on_the_cpu(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(repetition_penalty=1.5, temperature=0.9, seed=2)
    found = tokens(model, sampling=sampling)
    monkeypatch.setattr(decode, "is_on_gpu", lambda model: False)
    assert found == tokens(copy.deepcopy(model).cpu(), sampling=sampling)


def test_sequences_end_by_themselves(model: Transformer) -> None:
    """At EOS, where the context is full, after one token, or where the caller has enough."""
    whole = tokens(model)
    eos = whole[2][4]
    assert tokens(model, eos_ids=[eos]) == [ids[: ids.index(eos)] if eos in ids else ids for ids in whole]
    assert [len(ids) for ids in tokens(model, [[1] * 44, [1] * 47, [1]])] == [4, 1, 20]
    assert tokens(model, new=1) == [ids[:1] for ids in whole]
    finished: set[int] = set()
    found: list[list[int]] = [[] for _ in PROMPTS]
    for token in generate_batch(model, PROMPTS, max_new_tokens=20, sampling=GREEDY, finished=finished):
        found[token.sequence].append(token.id)
        if len(found[token.sequence]) == 5 * token.sequence + 1:
            finished.add(token.sequence)
    assert found == [whole[n][: 5 * n + 1] for n in range(4)]


def test_logprobs_are_the_models_own(model: Transformer) -> None:
    found = list(generate_batch(model, [[1, 2]], max_new_tokens=20, sampling=DRAWN))
    ids = torch.tensor([[1, 2, *(token.id for token in found)]], device=model.norm.weight.device)
    with torch.no_grad():
        expected = model(ids)[0].log_softmax(-1)
    for position, token in enumerate(found, 1):
        assert token.logprob == pytest.approx(expected[position, token.id].item(), abs=1e-4)


class TestKept:
    """A workspace that an earlier request used."""

    def test_the_next_request_takes_it_and_sees_nothing_of_the_last(self, model: Transformer) -> None:
        fresh = tokens(make(model.norm.weight.device.type), sampling=DRAWN)
        tokens(model, [[7] * 15, [8] * 20, [9], [10] * 3], sampling=Sampling(top_k=3, temperature=3.0))
        first = kept(model)
        with torch.inference_mode():
            first.cache.k.fill_(float("nan"))  # as weights that were not finite leave it
        assert tokens(model, sampling=DRAWN) == fresh
        assert kept(model) is first

    def test_weights_that_change_in_place_are_seen(self, model: Transformer) -> None:
        before, first = tokens(model), kept(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.ones_like(parameter).cumsum(-1).cos())
        assert tokens(model) == greedy(model, PROMPTS, 20) != before
        assert kept(model) is first

    def test_other_weights_other_modules_and_another_dtype_make_a_new_one(self, model: Transformer) -> None:
        def changed(change) -> None:
            tokens(model)
            first = kept(model)
            change()
            assert tokens(model) == greedy(model, PROMPTS, 20)
            assert kept(model) is not first

        class GeGLU(MLP):
            activation = staticmethod(lambda x: torch.nn.functional.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1])

        with torch.no_grad():
            noise = torch.nn.Parameter(model.lm_head.weight + 0.5 * model.lm_head.weight.cos())
        changed(lambda: setattr(model.lm_head, "weight", noise))
        changed(lambda: setattr(model.layers[0].mlp, "__class__", GeGLU))
        changed(model.double)

    def test_it_is_not_kept_if_a_step_reads_rounded_copies_of_the_weights(self, model: Transformer) -> None:
        """They may change later than the weights do."""
        assert device_decoder._can_be_kept(model)
        model.embed_tokens.compute_dtype = torch.bfloat16
        assert not device_decoder._can_be_kept(model)

    def test_it_grows_by_doubling_up_to_the_context(self, device: str) -> None:
        model = make(device, max_seq_len=128)
        sizes = []
        for new in (8, 20, 40, 10, 100):
            tokens(model, [[1] * 8], new=new)
            sizes.append(kept(model).cache.max_len)
        assert sizes == [16, 32, 64, 64, 128]
        tokens(model, [[1] * 8] * 2, new=8)
        assert (kept(model).batch, kept(model).cache.max_len) == (2, 16)

    def test_two_requests_at_the_same_time_do_not_disturb_each_other(self, model: Transformer) -> None:
        def request(sampling: Sampling) -> Iterator[tuple[int, int]]:
            for token in generate_batch(model, PROMPTS, max_new_tokens=20, sampling=sampling):
                yield token.sequence, token.id

        alone = [list(request(sampling)) for sampling in (GREEDY, DRAWN)]
        both = list(itertools.zip_longest(request(GREEDY), request(DRAWN)))
        assert [[pair[n] for pair in both] for n in range(2)] == alone

    def test_a_request_that_is_given_up_returns_it(self, model: Transformer) -> None:
        whole, first = tokens(model), kept(model)
        request = generate_batch(model, PROMPTS, max_new_tokens=20, sampling=GREEDY)
        for _ in range(6):
            next(request)
        assert model not in device_decoder._kept
        request.close()  # type: ignore[attr-defined]
        assert kept(model) is first
        assert tokens(model) == whole

    def test_after_an_error_it_is_not_kept(self, model: Transformer) -> None:
        tokens(model)
        with torch.no_grad():
            model.norm.weight[3] = float("nan")
        with pytest.raises(UserError, match="not finite"):
            tokens(model)
        assert model not in device_decoder._kept

    def test_it_ends_with_the_model(self, device: str) -> None:
        gc.collect()
        model = make(device)
        before = len(device_decoder._kept)
        tokens(model)
        assert len(device_decoder._kept) == before + 1
        device_decoder.forget(model)
        assert len(device_decoder._kept) == before
        tokens(model)
        del model
        gc.collect()
        assert len(device_decoder._kept) == before


@pytest.mark.gpu
def test_bf16_chooses_the_likeliest_token_of_a_pass_unless_two_are_nearly_as_likely() -> None:
    model = make("cuda").bfloat16()
    for prompt, ids in zip(PROMPTS, tokens(model), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]], device="cuda"))[0, len(prompt) - 1 : -1].float()
        lost = logits.amax(-1) - logits.gather(1, torch.tensor(ids, device="cuda")[:, None])[:, 0]
        assert (lost <= 0.06 * logits.abs().amax(-1)).all()
