"""The int8 model as a folder for ONNX Runtime (extra: onnx), with the inputs and outputs that Optimum gives a GPT-2.

It holds model.onnx, the graph of `onnx_graph` or of `onnx_integer` with our config.json and vocab.json in its metadata,
and the JSON files of `hf_documents`.
"""

import json
import os
from typing import Any

try:
    import onnx
    from onnx import helper
except ImportError as error:
    raise ImportError("this needs onnx; install it with: pip install 'picogpt_jax[onnx]'") from error

from picogpt_jax import __version__
from picogpt_jax.files import atomic_folder, check_replaceable, write_json
from picogpt_jax.formats.hf_documents import hf_documents
from picogpt_jax.formats.onnx_graph import GraphBuilder, Weights
from picogpt_jax.formats.onnx_integer import IntegerGraph
from picogpt_jax.int8.int8_model import Int8Model, config_to_json
from picogpt_jax.int8.integer_model import IntegerModel, integer_config_to_json
from picogpt_jax.runtimes.onnx_model import METADATA_KEY, MODEL_FILE

OPSET, IR_VERSION = 23, 11  # of ONNX 1.18, the first with Attention
INTEGER_OPSET, INTEGER_IR_VERSION = 21, 10  # of ONNX 1.16, the first that quantizes in blocks


def save_onnx(model: Int8Model | IntegerModel, folder: str | os.PathLike[str]) -> None:
    """Writes the folder in one step; an earlier one is replaced as a whole.

    Raises:
        UserError: `folder` cannot be written or holds other files.
    """
    documents = hf_documents(model.model, model.vocabulary)
    check_replaceable(folder, {MODEL_FILE, *documents})
    content = onnx_model(model).SerializeToString()
    with atomic_folder(folder) as temporary:
        (temporary / MODEL_FILE).write_bytes(content)
        for name, document in documents.items():
            write_json(temporary / name, document)


def onnx_model(model: Int8Model | IntegerModel, weights: Weights = "int8") -> onnx.ModelProto:
    """The checked graph.

    Args:
        weights: "float": the graph of a mixed model with the dequantized weights in float32, as a measure for int8.
    """
    metadata: dict[str, Any] = {"vocabulary": model.vocabulary.to_json(), "weights": weights}
    if isinstance(model, IntegerModel):
        metadata |= {"config": integer_config_to_json(model), "digest": model.digest.hex()}
        graph, opset, ir_version = IntegerGraph(model).build(), INTEGER_OPSET, INTEGER_IR_VERSION
    else:
        metadata |= {"config": config_to_json(model)}
        graph, opset, ir_version = GraphBuilder(model, weights).build(), OPSET, IR_VERSION
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
        producer_name="picogpt_jax",
        producer_version=__version__,
    )
    helper.set_model_props(proto, {METADATA_KEY: json.dumps(metadata, ensure_ascii=False)})
    onnx.checker.check_model(proto, full_check=True)
    return proto
