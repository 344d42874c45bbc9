"""onnxruntime's LSTM in a process of its own, so that its spinning threads slow no one else.

Started by sequence_peers.py. Reads a pickled dict of weights and sizes from standard input, answers
with the outputs for a check, then times as many runs as each line asks for. No torch in here.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def build(case: dict[str, Any]) -> bytes:
    """Build a model of LSTM nodes; ONNX orders the gates i, o, f, g and the biases as one row."""
    L, N, I, H = case["shape"]
    D = 2 if case["bidirectional"] else 1

    def reorder(w: np.ndarray) -> np.ndarray:
        i, f, g, o = np.split(w, 4)
        return np.concatenate([i, o, f, g])

    nodes, constants, inputs, value = [], [], [], "x"
    for layer, directions in enumerate(case["weights"]):
        names = [f"{kind}{layer}" for kind in ("W", "R", "B")]
        arrays = [
            np.stack([reorder(d[0]) for d in directions]),
            np.stack([reorder(d[1]) for d in directions]),
            np.stack([np.concatenate([reorder(d[2]), reorder(d[3])]) for d in directions]),
        ]
        constants += [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
        states = [f"h{layer}", f"c{layer}"]
        inputs += [helper.make_tensor_value_info(s, TensorProto.FLOAT, [D, N, H]) for s in states]
        raw = f"y{layer}"
        direction = "bidirectional" if D == 2 else "forward"
        nodes.append(
            helper.make_node(
                "LSTM", [value, *names, "", *states], [raw, f"hn{layer}", f"cn{layer}"],
                hidden_size=H, direction=direction,
            )
        )  # fmt: skip
        # [L, D, N, H] -> [L, N, D H]
        nodes.append(helper.make_node("Transpose", [raw], [raw + "t"], perm=[0, 2, 1, 3]))
        shape = numpy_helper.from_array(np.array([L, N, D * H]), f"shape{layer}")
        constants.append(shape)
        value = f"z{layer}"
        nodes.append(helper.make_node("Reshape", [raw + "t", shape.name], [value]))
    inputs.insert(0, helper.make_tensor_value_info("x", TensorProto.FLOAT, [L, N, I]))
    output = helper.make_tensor_value_info(value, TensorProto.FLOAT, [L, N, D * H])
    graph = helper.make_graph(nodes, "lstm", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def quantize(model: bytes, vnni: bool) -> bytes:
    """Turn LSTM nodes into DynamicQuantizeLSTM; without VNNI, weights of 7 bits, as it asks for."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder) / "plain.onnx", Path(folder) / "quantized.onnx"
        plain.write_bytes(model)
        quantize_dynamic(plain, quantized, weight_type=QuantType.QInt8, reduce_range=not vnni)
        return quantized.read_bytes()


def main() -> None:
    case = pickle.load(sys.stdin.buffer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case["threads"]
    model = build(case)
    if case["quantized"]:
        model = quantize(model, case["vnni"])
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    feeds = case["inputs"]
    (output,) = session.run(None, feeds)
    pickle.dump(output, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        repeats = int(line)
        start = time.perf_counter()
        for _ in range(repeats):
            session.run(None, feeds)
        seconds = (time.perf_counter() - start) / repeats
        sys.stdout.buffer.write(f"{seconds}\n".encode())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
