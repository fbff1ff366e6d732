"""`torch.compile` and `torch.export`: equal outputs, and how often the encoder compiles."""

import sys

import pytest
import torch
import torch._dynamo.testing
from reference import ODD_GRIDS, pack, packing_model, random_images, random_mixes, reference_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_compiled_model_gives_the_same(attn):
    packed = packing_model(reference_model(use_head=True), attn=attn)
    compiled = torch.compile(packed, backend="aot_eager")
    for grids in (ODD_GRIDS, ODD_GRIDS[:3]):
        inputs = pack(random_images(grids))
        with torch.no_grad():
            ours, expected = compiled(**inputs), packed(**inputs)
        assert (ours.last_hidden_state - expected.last_hidden_state).abs().max() < 1e-5
        assert (ours.pooler_output - expected.pooler_output).abs().max() < 1e-5


def test_the_varlen_path_compiles_whole_and_at_most_twice(monkeypatch):
    """One graph serves every mix; PyTorch's kernel, which needs a GPU, is replaced by one of the same signature."""
    packed = packing_model(reference_model())
    attention = sys.modules[sys.modules[type(packed).__module__].packed_attention.__module__]

    def varlen_attn(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        return query + key * cu_seqlens_q[-1] + value * max_seqlen_k

    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    encoder = torch.compile(packed.encoder, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for inputs in random_mixes(20):
            # Without blocks, as of a model on a GPU.
            layout = packed.prepare_layout(inputs["grid_thw"])._replace(blocks=())
            embedded = packed.embeddings(inputs["hidden_states"], layout)
            ours = encoder(embedded, layout).last_hidden_state
            expected = packed.encoder(embedded, layout).last_hidden_state
            assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert counter.frame_count <= 2


def test_the_encoder_exports_for_one_layout():
    """A layout is part of the exported program: batches of the same grids run through it."""
    packed = packing_model(reference_model())
    inputs = pack(random_images(ODD_GRIDS))
    layout = packed.prepare_layout(inputs["grid_thw"])

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = packed.encoder

        def forward(self, embedded):
            return self.encoder(embedded, layout).last_hidden_state

    with torch.no_grad():
        embedded = packed.embeddings(inputs["hidden_states"], layout)
        exported = torch.export.export(Encoder(), (embedded,)).module()
        other = packed.embeddings(pack(random_images(ODD_GRIDS))["hidden_states"], layout)
        assert (exported(other) - packed.encoder(other, layout).last_hidden_state).abs().max() < 1e-5


def test_the_encoder_exports_for_any_number_of_images_of_one_size():
    packed = packing_model(reference_model())
    of_one = packed.prepare_layout(torch.tensor([(1, 4, 5)]))

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = packed.encoder

        def forward(self, embedded):
            images, length, _ = embedded.shape
            cu_seqlens = torch.arange(images + 1, dtype=torch.int32) * length
            segments = of_one.segments._replace(cu_seqlens=cu_seqlens, runs=((images, length),))
            layout = of_one._replace(segments=segments, blocks=())
            return self.encoder(embedded.flatten(0, 1), layout).last_hidden_state

    with torch.no_grad():
        images = torch.export.Dim("images", min=2)
        exported = torch.export.export(Encoder(), (torch.randn(3, 20, 64),), dynamic_shapes=({0: images},)).module()
        for count in (2, 5, 40):
            embedded = torch.randn(count, 20, 64)
            expected = packed.encoder(embedded.flatten(0, 1), packed.prepare_layout(torch.tensor([(1, 4, 5)] * count)))
            assert (exported(embedded) - expected.last_hidden_state).abs().max() < 1e-5
