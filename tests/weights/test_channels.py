import numpy as np
import pytest

from opq_jax.weights import channel_axis


@pytest.mark.parametrize(
  ('path', 'shape', 'axis'),
  [
    ('layer1.0.conv1.weight', (16, 3, 3, 3), 0),
    ('encoder/layers/0/weight', (8, 4), 0),
    ('attn.in_proj_weight', (24, 8), 0),
    ('embeddings.word_embeddings.weight', (1000, 64), -1),
    ('transformer.wte.weight', (1000, 64), -1),
    ('time_embedding.linear_1.weight', (64, 32), 0),
    ('patch_embed.proj.weight', (64, 3, 16, 16), 0),
    ('patch_embed.weight', (64, 3, 16, 16), 0),
    ('params/conv/kernel', (3, 3, 8, 16), -1),
    ('params/embed/embedding', (1000, 64), -1),
    ('MobilenetV1/Conv2d_1_depthwise/depthwise_weights', (3, 3, 32, 1), -2),
    ('MobilenetV1/Conv2d_1_pointwise/weights', (1, 1, 32, 64), -1),
    ('weight', (8, 4), 0),
    ('rnn.weight_ih_l0', (256, 64), 0),
    ('rnn.weight_hh_l1_reverse', (256, 64), 0),
    ('conv.weight_v', (8, 4, 3), 0),
    ('fc.parametrizations.weight.original1', (8, 4), 0),
    ('shared.weight', (1000, 64), -1),
    ('decoder.up.weight', (64, 32, 2, 2), 1),
    ('mlp.up_proj.weight', (256, 64), 0),  # no convolution
    ('h.0.attn.c_attn.weight', (64, 192), -1),
    ('h.0.attn.c_attn.weight', (192, 64), 0),  # GPT-2 with PyTorch's own linear layers
    ('h.0.attn.c_proj.weight', (64, 64), -1),
    ('h.0.mlp.c_proj.weight', (256, 64), -1),
  ],
)
def test_channel_axis_goes_by_the_name(path, shape, axis):
  assert channel_axis(path, np.zeros(shape)) == axis
  assert channel_axis(path, np.zeros(shape), 'first') == 0
  assert channel_axis(path, np.zeros(shape), 'last') == -1


def test_channel_axis_of_an_unknown_mode():
  with pytest.raises(ValueError, match="w: found mode 'middle', expected auto, first or last"):
    channel_axis('w', np.zeros((2, 2)), 'middle')
