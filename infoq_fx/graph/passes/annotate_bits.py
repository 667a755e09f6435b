"""Writes the bit-widths of a quantized graph into ``node.meta``."""

from __future__ import annotations

from torch import fx

from infoq_fx.graph.layers import LAYER_OPS, MATMUL_OPS, RECURRENT_OPS
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op
from infoq_fx.types import FLOAT_BITS

__all__ = ["annotate_bits", "read_bits"]

_META_KEY = "infoq"


def annotate_bits(graph_module: fx.GraphModule) -> bool:
    """Set ``node.meta["infoq"]`` from the graph itself, which restores it after pickle or export dropped it.

    1. a quantize or dequantize node: ``{"site": name, "bits": bits}``.
    2. a layer or matrix product: ``{"operand_bits": bits of its operands in the order of its arguments}``, 32 for
       a float operand. An embedding has one operand, its weight; a recurrent layer has its weights.
    """
    for node in graph_module.graph.nodes:
        if node.target in (quantize_dequantize_op, dequantize_op):
            node.meta[_META_KEY] = {"site": node.args[4], "bits": node.args[3]}
        elif node.target in RECURRENT_OPS:
            weights = [source for source in node.all_input_nodes if source.target is dequantize_op]
            node.meta[_META_KEY] = {"operand_bits": tuple(source.meta[_META_KEY]["bits"] for source in weights)}
        elif node.target in LAYER_OPS or node.target in MATMUL_OPS:
            is_lookup = node.target in LAYER_OPS and LAYER_OPS[node.target].is_lookup
            sources = node.all_input_nodes[:1] if is_lookup else node.all_input_nodes
            operands = [source.meta.get(_META_KEY, {}).get("bits", FLOAT_BITS) for source in sources]
            node.meta[_META_KEY] = {"operand_bits": tuple(operands)}
    return True


def read_bits(graph: fx.Graph) -> dict[str, int]:
    """Return the bit-width of every site from the custom ops of a graph, without biases."""
    bits = {}
    for node in graph.nodes:
        if node.target in (quantize_dequantize_op, dequantize_op) and node.args[3] != FLOAT_BITS:
            bits[str(node.args[4])] = int(node.args[3])
    return bits
