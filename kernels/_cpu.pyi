"""Types of csrc/cpu/bindings.cpp. An address is that of a tensor's first element; 0 is an absent tensor."""

_Strided = tuple[int, int, int, int]  # address and strides: csrc/cpu/strided.hpp
_Shape = tuple[int, int, int, int, int, int]  # B, Sq, Sk, Hq, Hkv, D

NORM_ROWS: int
GRAM_ROWS: int

def attention_forward(
    shape: _Shape,
    causal: bool,
    bf16: bool,
    scale: float,
    doc_start: int,
    threads: int,
    q: _Strided,
    k: _Strided,
    v: _Strided,
    out: int,
    lse: int,
) -> None: ...
def attention_backward(
    shape: _Shape,
    causal: bool,
    bf16: bool,
    scale: float,
    doc_start: int,
    threads: int,
    dout: _Strided,
    q: _Strided,
    k: _Strided,
    v: _Strided,
    out: int,
    lse: int,
    dq: int,
    dk: int,
    dv: int,
) -> None: ...
def swiglu_forward(bf16: bool, threads: int, rows: int, f: int, gate: _Strided, up: _Strided, y: int) -> None: ...
def swiglu_backward(
    bf16: bool,
    threads: int,
    rows: int,
    f: int,
    dy: _Strided,
    gate: _Strided,
    up: _Strided,
    dgate: int,
    dup: int,
    gradient_row: int,
) -> None: ...
def rms_norm_forward(
    bf16: bool,
    threads: int,
    rows: int,
    d: int,
    eps: float,
    x: _Strided,
    residual: int,
    weight: int,
    y: int,
    total: int,
    rstd: int,
) -> None: ...
def rms_norm_backward(
    bf16: bool,
    threads: int,
    rows: int,
    d: int,
    x: _Strided,
    weight: int,
    dy: int,
    dtotal: int,
    dx: int,
    rstd: int,
    dw_shares: int,
) -> None: ...
def rope(
    bf16: bool,
    threads: int,
    inverse: bool,
    batch_and_length: tuple[int, int],
    heads: tuple[int, int],
    d: int,
    q: _Strided,
    k: _Strided,
    cos: int,
    sin: int,
    q_out: int,
    k_out: int,
) -> None: ...
def cross_entropy_in_place(
    bf16: bool,
    threads: int,
    rows: int,
    columns: int,
    row_stride: int,
    vocab_size: int,
    ignore_index: int,
    z_loss: float,
    logits: int,
    target: int,
    factor: int,
    loss: int,
    lse: int,
) -> None: ...
def gram_polynomial(
    threads: int,
    steps: int,
    count: int,
    rows: int,
    coefficients: tuple[float, float, float],
    gram: int,
    polynomial: int,
) -> None: ...
