"""Fast attention of DeBERTa reward models: kept where it computes the same, never needed."""

import copy
import functools
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from fast_attention import switch_attention, use_fast_attention
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Config
from transformers import DebertaV2ForSequenceClassification as DebertaV2

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LENGTHS = [(64, 40), (3, 1), (17, 17, 9)]


def deberta() -> DebertaV2:
    """A small DeBERTa-v3 in half precision, whose attention and positions matter."""
    torch.manual_seed(0)
    relative = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
    kind = {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
    sizes = {"vocab_size": 300, "max_position_embeddings": 64, "type_vocab_size": 0, "num_labels": 1}
    config = DebertaV2Config(**SHAPE, **relative, **kind, **sizes, initializer_range=0.15)
    return DebertaV2(config).half().eval()


@pytest.fixture
def model() -> DebertaV2:
    return deberta()


@torch.inference_mode()
def padded_rewards(model: torch.nn.Module, lengths: tuple[int, ...]) -> torch.Tensor:
    """Rewards [batch] of random tokens, right-padded."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(300, (len(lengths), max(lengths)), generator=generator)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
    return model(**inputs).logits.squeeze(-1).float().cpu()


class StandInEncoder(torch.nn.Module):
    """Not the package's encoder: the eager one, behind the package's rule of one prepared length a time."""

    def __init__(self, encoder: torch.nn.Module, lengths: list[int]):
        super().__init__()
        self.encoder = encoder
        self.lengths = lengths
        self.active = lengths[0]

    def activate_shape(self, length: int) -> None:
        assert length in self.lengths, f"{length} was not prepared"
        self.active = length

    def forward(self, hidden_states: torch.Tensor, *inputs, **options):
        assert hidden_states.shape[1] == self.active
        return self.encoder(hidden_states, *inputs, **options)


def positions_off_by_one(attention: torch.nn.Module) -> None:
    bias = attention.disentangled_attention_bias
    attention.disentangled_attention_bias = lambda q, k, position, *rest: bias(q, k, position + 1, *rest)


def padding_read(attention: torch.nn.Module) -> None:
    read = attention.forward
    attention.forward = lambda states, mask, *rest, **more: read(states, torch.ones_like(mask), *rest, **more)


def nothing_but_nan(attention: torch.nn.Module) -> None:
    attention.value_proj.weight.data.fill_(torch.nan)


def breaks_in_use(attention: torch.nn.Module) -> None:
    def forward(*inputs, **options):
        raise RuntimeError("out of resources:\nshared memory, required 1, limit 0")

    attention.forward = forward


@pytest.fixture
def stand_in(monkeypatch):
    """Installs a stand-in for the package: `change` is what its copy of each attention does differently."""

    def install(change=lambda attention: None, lengths=(48, 96), optimize=None) -> None:
        def optimize_deberta(backbone: torch.nn.Module, sequence_lengths: range) -> None:
            for layer in backbone.encoder.layer:
                layer.attention.self = copy.deepcopy(layer.attention.self)
                change(layer.attention.self)
            backbone.encoder = StandInEncoder(backbone.encoder, list(sequence_lengths))  # in place, as theirs

        package = types.ModuleType("disentangled_flash")
        tuning = types.ModuleType("disentangled_flash.tuning")
        package.__spec__ = ModuleSpec("disentangled_flash", loader=None)
        package.optimize_deberta, package.__version__ = optimize or optimize_deberta, "stand-in"
        tuning.TUNING_SEQUENCE_LENGTHS = lengths
        monkeypatch.setitem(sys.modules, "disentangled_flash", package)
        monkeypatch.setitem(sys.modules, "disentangled_flash.tuning", tuning)

    return install


def assert_kept_as_it_was(model: DebertaV2, message: str, capsys) -> None:
    """One warning, and the very modules and rewards of a model nothing was done to."""
    expected = padded_rewards(model, (40, 23))
    encoder = model.deberta.encoder
    attentions = [layer.attention.self for layer in encoder.layer]
    capsys.readouterr()

    assert switch_attention(model) is None
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: no fast attention") and message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert model.deberta.encoder is encoder
    assert [layer.attention.self for layer in encoder.layer] == attentions
    assert torch.equal(padded_rewards(model, (40, 23)), expected)


def test_a_package_that_computes_the_same_is_used_at_every_length(model, stand_in, capsys):
    expected = [padded_rewards(model, lengths) for lengths in LENGTHS]
    stand_in()
    assert "stand-in" in switch_attention(model) and capsys.readouterr().err == ""
    assert isinstance(model.deberta.encoder, StandInEncoder)
    for lengths, rewards in zip(LENGTHS, expected, strict=True):
        assert torch.equal(padded_rewards(model, lengths), rewards)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("package", "message"),
    [
        ({"change": positions_off_by_one}, "rewards differ by"),
        ({"change": padding_read}, "rewards differ by"),
        ({"change": nothing_but_nan}, "rewards differ by"),
        ({"change": breaks_in_use}, "out of resources:"),
        ({"optimize": lambda *_, **__: None}, "heads of 32, 64 or 128"),
        ({"lengths": (16, 32)}, "no inputs of 64 tokens"),
    ],
)
def test_a_package_that_is_wrong_fails_or_declines_is_not_used(
    package, message, dtype, model, stand_in, capsys
):
    stand_in(**package)
    assert_kept_as_it_was(model.to(dtype), message, capsys)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("__version__ = '0.1'", "cannot import name 'optimize_deberta'"),
        ("raise OSError('libcuda.so.1: no such file')", "libcuda.so.1"),
    ],
)
def test_a_package_that_does_not_import_is_not_used(code, message, model, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "disentangled_flash"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "disentangled_flash.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert_kept_as_it_was(model, message, capsys)
    sys.modules.pop("disentangled_flash", None)


def test_only_deberta_in_half_precision_on_a_gpu_is_switched(model, stand_in, monkeypatch, capsys):
    stand_in()
    assert use_fast_attention(model) is None  # on a CPU

    # No GPU here: only what the function asks about the device is replaced.
    monkeypatch.setattr(DebertaV2, "device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr(BertForSequenceClassification, "device", DebertaV2.device)
    monkeypatch.setattr("fast_attention.switch_attention", lambda model: "fast")
    bert = BertForSequenceClassification(BertConfig(vocab_size=300, **SHAPE)).half()
    assert use_fast_attention(bert) is use_fast_attention(deberta().float()) is None
    assert use_fast_attention(model) == "fast"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("fast_attention.find_spec", lambda name: None)
    assert use_fast_attention(model) is None
    assert "requirements-gpu.txt` installs it" in capsys.readouterr().err


def test_the_real_package_takes_the_model_and_gives_its_rewards(model, monkeypatch):
    """The real package's own PyTorch path, which a CPU can run, in place of its kernel."""
    package = pytest.importorskip("disentangled_flash")
    on_cpu = functools.partial(package.optimize_deberta, backend="torch")
    monkeypatch.setattr(package, "optimize_deberta", on_cpu)
    expected = [padded_rewards(model, lengths) for lengths in LENGTHS]
    assert package.__version__ in switch_attention(model)
    assert type(model.deberta.encoder).__module__ == "disentangled_flash.deberta"
    for lengths, rewards in zip(LENGTHS, expected, strict=True):
        torch.testing.assert_close(padded_rewards(model, lengths), rewards, atol=0.01, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_real_kernel_gives_the_same_rewards_on_a_gpu(model):
    pytest.importorskip("disentangled_flash")
    expected = [padded_rewards(model.cuda(), lengths) for lengths in [(64, 40, 7), (9, 4)]]
    assert use_fast_attention(model) is not None
    for lengths, rewards in zip([(64, 40, 7), (9, 4)], expected, strict=True):
        torch.testing.assert_close(padded_rewards(model, lengths), rewards, atol=0.02, rtol=0.02)
