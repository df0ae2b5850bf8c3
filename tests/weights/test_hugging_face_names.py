"""What is compressed of transformers' networks by the names of tensors, and which axis is out.

Names and layouts are those that `save_pretrained` of transformers 5.24 writes.
"""

import jax
import numpy as np
import pytest

from opq_jax.allocation import is_compressible
from opq_jax.weights import channel_axis

LLAMA = """
model.embed_tokens.weight 320,64 -1
model.layers.0.self_attn.q_proj.weight 64,64 0
model.layers.0.self_attn.k_proj.weight 32,64 0
model.layers.0.self_attn.v_proj.weight 32,64 0
model.layers.0.self_attn.o_proj.weight 64,64 0
model.layers.0.mlp.gate_proj.weight 128,64 0
model.layers.0.mlp.up_proj.weight 128,64 0
model.layers.0.mlp.down_proj.weight 64,128 0
model.layers.0.input_layernorm.weight 64 no
model.layers.0.post_attention_layernorm.weight 64 no
model.norm.weight 64 no
lm_head.weight 320,64 0
"""
NETWORKS = {
  'llama, mistral': LLAMA,
  'qwen2': LLAMA + 'model.layers.0.self_attn.q_proj.bias 64 no',
  'qwen3': LLAMA + 'model.layers.0.self_attn.q_norm.weight 16 no',
  'gemma2': LLAMA + 'model.layers.0.pre_feedforward_layernorm.weight 64 no',
  'phi3': """
    model.layers.0.self_attn.qkv_proj.weight 128,64 0
    model.layers.0.mlp.gate_up_proj.weight 256,64 0
  """,
  'mixtral': """
    model.layers.0.block_sparse_moe.gate.weight 4,64 0
    model.layers.0.block_sparse_moe.experts.3.w1.weight 128,64 0
    model.layers.0.block_sparse_moe.experts.3.w2.weight 64,128 0
  """,
  # Conv1D has [inputs, outputs]; attn.bias is the mask of older files
  'gpt2': """
    transformer.wte.weight 320,64 -1
    transformer.wpe.weight 128,64 -1
    transformer.h.0.attn.c_attn.weight 64,192 -1
    transformer.h.0.attn.c_proj.weight 64,64 -1
    transformer.h.0.mlp.c_fc.weight 64,256 -1
    transformer.h.0.mlp.c_proj.weight 256,64 -1
    transformer.h.0.attn.c_attn.bias 192 no
    transformer.h.0.attn.bias 1,1,128,128 no
    transformer.h.0.attn.masked_bias - no
    transformer.h.0.ln_1.weight 64 no
    transformer.ln_f.weight 64 no
  """,
  'bert': """
    bert.embeddings.word_embeddings.weight 320,64 -1
    bert.embeddings.position_embeddings.weight 512,64 -1
    bert.embeddings.token_type_embeddings.weight 2,64 -1
    bert.embeddings.LayerNorm.weight 64 no
    bert.encoder.layer.0.attention.self.query.weight 64,64 0
    bert.encoder.layer.0.attention.output.dense.weight 64,64 0
    bert.encoder.layer.0.attention.output.LayerNorm.weight 64 no
    bert.encoder.layer.0.intermediate.dense.weight 128,64 0
    bert.encoder.layer.0.output.dense.weight 64,128 0
    cls.predictions.transform.dense.weight 64,64 0
    cls.predictions.bias 320 no
  """,
  't5': """
    shared.weight 320,64 -1
    encoder.block.0.layer.0.SelfAttention.q.weight 64,64 0
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight 32,4 no
    encoder.block.0.layer.0.layer_norm.weight 64 no
    decoder.block.0.layer.1.EncDecAttention.o.weight 64,64 0
    decoder.block.0.layer.2.DenseReluDense.wi_0.weight 128,64 0
    decoder.block.0.layer.2.DenseReluDense.wo.weight 64,128 0
  """,
  'vit': """
    vit.embeddings.cls_token 1,1,64 no
    vit.embeddings.position_embeddings 1,17,64 -1
    vit.embeddings.patch_embeddings.projection.weight 64,3,8,8 0
    vit.encoder.layer.0.attention.attention.query.weight 64,64 0
    vit.encoder.layer.0.layernorm_before.weight 64 no
    classifier.weight 2,64 0
  """,
  'whisper': """
    model.encoder.conv1.weight 64,80,3 0
    model.encoder.embed_positions.weight 50,64 -1
    model.decoder.embed_tokens.weight 320,64 -1
    model.decoder.layers.0.encoder_attn.out_proj.weight 64,64 0
    model.decoder.layers.0.encoder_attn_layer_norm.weight 64 no
    model.decoder.layers.0.fc1.weight 128,64 0
    model.decoder.layers.0.fc2.weight 64,128 0
  """,
  'mamba': """
    backbone.embeddings.weight 320,64 -1
    backbone.layers.0.mixer.in_proj.weight 256,64 0
    backbone.layers.0.mixer.conv1d.weight 128,1,4 0
    backbone.layers.0.mixer.A_log 128,16 no
    backbone.layers.0.mixer.D 128 no
  """,
}


@pytest.mark.parametrize('network', NETWORKS)
def test_names_of_transformers(network):
  for line in NETWORKS[network].strip().splitlines():
    name, sizes, axis = line.split()
    shape = () if sizes == '-' else tuple(map(int, sizes.split(',')))
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    assert is_compressible(name, leaf) == (axis != 'no'), name
    if axis != 'no':
      assert channel_axis(name, leaf) == int(axis), name
