"""What the graph of an ONNX file says about its weights, in the plan of a compression."""

import dataclasses
import glob
from collections.abc import Mapping

from opq_jax.cli.encoding import Encoding
from opq_jax.weights import GraphUse


def planned_by_graph(
  plan: Encoding, graph: Mapping[str, GraphUse] | None, chosen: set[str]
) -> Encoding:
  """Returns the plan with the axes and slices that a graph tells of the leaves to compress.

  Slices of the plan go before those of the graph, and so does a channel axis that is not `auto`.

  Args:
    plan: targets, channel axis and slices that were asked for.
    graph: the uses of weights by name; None of a file without a graph.
    chosen: paths of the leaves to compress.

  >>> graph = {'conv.w': GraphUse('Conv', 0), 'lstm.w': GraphUse('LSTM', 1, slices=1)}
  >>> plan = planned_by_graph(Encoding(), graph, {'lstm.w'})
  >>> plan.channel_axes, plan.slices
  ({'lstm.w': 1}, {'lstm.w': 1})
  """
  if graph is None:
    return plan
  # a line of the metadata is a name: one with a line break has the axis that its name tells
  known = {name: use for name, use in graph.items() if name in chosen and '\n' not in name}
  slices = {glob.escape(name): use.slices for name, use in known.items() if use.slices}
  axes = {name: use.channel_axis for name, use in known.items()}
  return dataclasses.replace(
    plan,
    channel_axes=axes if plan.channel_axis == 'auto' else {},
    slices={**slices, **plan.slices},
  )
