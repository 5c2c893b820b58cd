"""Names of dtypes: each names one, and Triton's are those that Triton gives tensors."""

from triton._utils import type_canonicalisation_dict as canonical

from moec.ir.dtypes import BUFFERS, DTYPE_NAMES, DTYPES, GRAPH_DTYPES, GRAPH_NAMES, STORED, TRITON


def test_names_and_dtypes_are_inverse():
    assert [DTYPE_NAMES[dtype] for dtype in DTYPES.values()] == list(DTYPES)
    assert [GRAPH_NAMES[dtype] for dtype in GRAPH_DTYPES.values()] == list(GRAPH_DTYPES)


def test_each_table_holds_those_before_it():
    assert DTYPES.items() <= STORED.items() <= BUFFERS.items()
    assert DTYPES.items() <= GRAPH_DTYPES.items()


def test_triton_calls_a_tensor_so():
    assert [canonical[str(dtype).removeprefix("torch.")] for dtype in TRITON.values()] == list(TRITON)
