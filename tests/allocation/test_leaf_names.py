"""Names and shapes of the frameworks, and whether such a leaf is compressed by default."""

import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import importers, models
from opq_jax.allocation import is_compressible
from opq_jax.allocation.leaf_names import NAME_PATTERNS, kind_of_name, plain_name
from opq_jax.core import trees

ROOT = Path(__file__).parents[2]

# names of matrices, as the frameworks write them; stacked or not, they are compressed
_MATRICES = """
params/Dense_0/kernel params/MultiHeadDotProductAttention_0/query/kernel params/Embed_0/embedding
params/Conv_0/kernel params/SelfAttention_0/out/kernel layers/0/kernel/value blocks[3].mlp.w_gate
linear/w conv2_d_1/w embed/embeddings layers/0/weight mlp.0.weight lm_head/weight
bert.encoder.layer.0.attention.self.query.weight bert.embeddings.word_embeddings.weight
bert.embeddings.position_embeddings.weight h.0.attn.c_attn.weight wte.weight wpe.weight
model.layers.0.self_attn.q_proj.weight model.layers.0.mlp.gate_proj.weight
model.layers.0.block_sparse_moe.gate.weight model.layers.0.mlp.experts.gate_up_proj
shared.weight shared/embedding encoder.block.0.layer.0.SelfAttention.q.weight
encoder.block.0.layer.1.DenseReluDense.wi_0.weight deberta.encoder.rel_embeddings.weight
transformer_blocks.0.norm1.linear.weight adaLN_modulation.1.weight norm_proj.weight
vision.embeddings.patch_embedding.weight pos_embed in_proj_weight weight_ih_l0
parametrizations.weight.original1
conv1/kernel block1_conv1/depthwise_kernel attention/query_dense/kernel embedding/embeddings
encoder/mu/kernel experts/wi experts/gate w w1 table positional_embedding mixer.conv1d.weight
features.denseblock1.denselayer1.conv1.weight query_tokens lora_a lora_b logits/kernel
"""

# names of leaves that pass through, even with two long axes or more
_LEFT = """
params/Dense_0/bias params/MultiHeadDotProductAttention_0/query/bias layers/LayerNorm_0/scale
layers/BatchNorm_0/bias layers/RMSNorm_0/scale params/GroupNorm_0/scale/value
batch_stats/BatchNorm_0/mean batch_stats/stem_bn/var layers/norm/weight layers/bn/mean
batch_norm/scale batch_norm/offset batch_norm/~/mean_ema/average batch_norm/~/var_ema/hidden
bert.encoder.layer.0.attention.output.LayerNorm.weight h.0.ln_1.weight transformer.ln_f.weight
model.layers.0.input_layernorm.weight model.layers.0.post_attention_layernorm.weight
model.norm.weight model.layers.0.self_attn.q_norm.weight model.layers.0.mlp.gate_proj.bias
model.layers.0.self_attn.rotary_emb.inv_freq layer1.0.bn1.running_var layer1.0.bn1.weight
h.0.attn.bias h.0.attn.masked_bias self_attn.in_proj_bias rnn.bias_hh_l0
encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding
encoder.block.0.layer.0.layer_norm.weight encoder/relpos_bias/rel_embedding
layers.0.blocks.1.attn.relative_position_bias_table layers.0.blocks.1.attn.relative_position_index
encoder.rel_pos_x_bias.weight attention_biases blocks.0.gamma_1 blocks.0.ls1.gamma
layer_scale1.lambda1 block/layer_scale bn/gamma bn/beta bn/moving_mean bn/moving_variance
attn_mask causal_mask conv.weight_mask tril position_ids pos_encoder.pe freqs_cis rope/cos
rotary_emb.cos_cached logit_scale weight_scale weight_scale_inv scale_shift_table
cross_attn_attn_gate gate_mlp mixer.A_log mixer.dt_bias attention.time_decay
opt_state/0/nu/params/Dense_0/kernel optimizer.state.0.exp_avg optimizer_state/3/w
"""


@pytest.mark.parametrize('name', _MATRICES.split())
def test_is_compressible_matrix(name):
  assert is_compressible(name, np.zeros((12, 64), np.float32))
  assert is_compressible(name, np.zeros((12, 3, 64), np.float16))


@pytest.mark.parametrize('name', _LEFT.split())
def test_is_compressible_left(name):
  assert not is_compressible(name, np.zeros((12, 64), np.float32))
  assert not is_compressible(name, np.zeros((2, 12, 64), np.float32))


@pytest.mark.parametrize('shape', [(), (64,), (64, 1), (1, 1, 64), (64, 1, 1), (1, 1, 1, 64), (1,)])
def test_is_compressible_vector(shape):
  assert not is_compressible('w', np.zeros(shape, np.float32))


@pytest.mark.parametrize('shape', [(2, 2), (1, 1, 8, 4), (3, 3, 1, 8), (1, 5, 1, 2)])
def test_is_compressible_shapes(shape):
  assert is_compressible('w', np.zeros(shape, np.float32))
  assert not is_compressible('w', np.zeros(shape, np.int32))


def test_patterns_match_examples():
  for row in NAME_PATTERNS:
    assert {kind_of_name(example) for example in row.examples} == {row.kind}, row


def test_patterns_ignore_places():
  for name in (
    'blocks.12.norm1.weight',
    'blocks[12].norm1.weight',
    "['blocks']/1/norm1/weight/value",
  ):
    assert plain_name(name) == 'blocks/norm1/weight'
  assert kind_of_name('value') is None and plain_name('value') == 'value'


@pytest.mark.parametrize('part', ['norm_', 'bias_', 'a', 'Aa', 'rel_pos_', 'scale/', 'proj_norm'])
def test_patterns_of_long_names(part):
  began = time.process_time()
  assert kind_of_name(part * 100_000 + '/weight') in (None, 'scales of normalizations')
  assert time.process_time() - began < 1


def test_guide_lists_patterns():
  guide = (ROOT / 'docs/guides/what_is_compressed.md').read_text()
  rows = dict(re.findall(r'^\| ([^|]+) \| ([^|]+) \|$', guide, re.MULTILINE))
  for row in NAME_PATTERNS:
    assert rows[row.kind] == ', '.join(f'`{example}`' for example in row.examples)


@pytest.mark.parametrize('name', models.names())
def test_is_compressible_models(name):
  shapes = trees.named_leaves(models.variable_shapes(models.create(name)))
  kernels = {path for path, leaf in shapes.items() if len(leaf.shape) >= 2}
  assert kernels == {path for path, leaf in shapes.items() if is_compressible(path, leaf)}


@pytest.mark.parametrize('name', models.names())
def test_is_compressible_importers(name):
  """Names of every framework that the importers know choose the kernels, and only these."""
  shapes = models.variable_shapes(models.create(name))
  zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
  for source in importers.sources(name):
    tensors = importers.to_tensors(name, zeros, source.name)
    kernels = {path for path, leaf in tensors.items() if np.ndim(leaf) >= 2}
    assert kernels == {path for path, leaf in tensors.items() if is_compressible(path, leaf)}


def test_allocate_leaves_small_parts():
  """A stack of layers with attention: its kernels are allocated, and nothing else."""
  draw = np.random.default_rng(0).laplace
  f4 = lambda *shape: draw(size=shape).astype(np.float32)
  kernels = {
    'layers/attn/query/kernel': f4(3, 16, 4, 8),
    'layers/mlp/kernel': f4(3, 16, 32),
    'embed/embedding': f4(40, 16),
    'cell/w': f4(3, 16, 16),
  }
  rest = {
    'layers/attn/query/bias': f4(3, 4, 8),
    'layers/LayerNorm_0/scale': f4(3, 16),
    'layers/mlp/bias': f4(3, 32),
    'cell/b': f4(3, 16),
    'pos/pe': f4(40, 16),
    'mask': f4(16, 16),
  }
  allocation = opq_jax.allocate(kernels | rest, compression_rate=8.0)
  assert {name for name, leaf in allocation.tree.items() if leaf is not None} == set(kernels)


def test_allocate_own_choice():
  tree = {'bias': jnp.asarray(np.random.default_rng(0).laplace(size=(16, 16)), jnp.float32)}
  with pytest.raises(ValueError, match='found no leaf to compress'):
    opq_jax.allocate(tree)
  assert opq_jax.allocate(tree, compressible=lambda *_: True).tree['bias'] is not None
