"""Small ONNX files, and their runs in onnxruntime."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def laplace(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).laplace(size=shape).astype(np.float32)


def model(nodes, inputs, outputs, arrays, opset=17):
  """A model; inputs and outputs are shapes by name, and arrays become initializers."""
  value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
  graph = helper.make_graph(
    nodes,
    'net',
    [value(*one) for one in inputs.items()],
    [value(*one) for one in outputs.items()],
    [numpy_helper.from_array(array, name) for name, array in arrays.items()],
  )
  imports = [helper.make_opsetid('', opset)]
  return helper.make_model(graph, opset_imports=imports, ir_version=10 if opset > 20 else 8)


def layers():
  """A model with every kind of layer that has weights, one behind the other and side by side."""
  arrays = {
    'conv': laplace(16, 8, 3, 3),
    'grouped': laplace(16, 4, 3, 3),
    'transposed': laplace(16, 8, 3, 3),
    'gemm': laplace(8, 169),
    'gemm_bias': np.arange(8, dtype=np.float32),
    'matmul': laplace(8, 24),
    'first': laplace(32, 6),
    'table': laplace(50, 24),
    'lstm/W': laplace(2, 32, 24),
    'lstm/R': laplace(2, 32, 8),
    'flat': np.array([1, -1, 169]),
    'rows': np.array([[3], [0], [49], [3], [7], [7]]),
  }
  node = helper.make_node
  nodes = [
    node('Conv', ['x', 'conv'], ['a']),
    node('Conv', ['a', 'grouped'], ['b'], group=4),
    node('ConvTranspose', ['b', 'transposed'], ['c'], strides=[2, 2]),
    node('Reshape', ['c', 'flat'], ['d']),
    node('Squeeze', ['d'], ['e']),
    node('Gemm', ['e', 'gemm', 'gemm_bias'], ['f'], transB=1),
    node('MatMul', ['f', 'matmul'], ['g']),
    node('Gather', ['table', 'rows'], ['h']),
    node('LSTM', ['h', 'lstm/W', 'lstm/R'], ['i'], hidden_size=8, direction='bidirectional'),
    node('Transpose', ['g'], ['j']),
    node('Slice', ['j', 'zero', 'six', 'zero'], ['k']),
    node('MatMul', ['first', 'k'], ['l']),
  ]
  arrays |= {'zero': np.array([0]), 'six': np.array([6])}
  shapes = {'g': [8, 24], 'i': [6, 2, 1, 8], 'l': [32, 8]}
  return model(nodes, {'x': [1, 8, 10, 10]}, shapes, arrays)


def run(source, **inputs):
  """The outputs of a model, or of a file, in onnxruntime by name."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  data = source.SerializeToString() if isinstance(source, onnx.ModelProto) else source
  session = onnxruntime.InferenceSession(data, options, providers=['CPUExecutionProvider'])
  names = [one.name for one in session.get_outputs()]
  return dict(zip(names, session.run(None, inputs), strict=True))


def constants(path, names, brains=()):
  """The tensors of these names in a file, as onnxruntime computes them; `brains` as float32."""
  net = onnx.load(path)
  is_ours = lambda output: any(output == name or output.startswith(f'{name}.') for name in names)
  nodes = [one for one in net.graph.node if is_ours(one.output[0])]
  for name in names:
    # NumPy has no bfloat16 for onnxruntime
    cast = {'to': TensorProto.FLOAT} if name in brains else {}
    nodes.append(helper.make_node('Cast' if cast else 'Identity', [name], [f'{name}/out'], **cast))
  del net.graph.node[:], net.graph.output[:], net.graph.input[:]
  net.graph.node.extend(nodes)
  net.graph.output.extend(onnx.ValueInfoProto(name=f'{name}/out') for name in names)
  return {name.removesuffix('/out'): array for name, array in run(net).items()}
