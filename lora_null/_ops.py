"""Stand-in until lora_null.ops is there."""

try:
    from .ops import covariance_update, symmetrize_
except ImportError:

    def covariance_update(C, x, *, mask=None):
        x = x.to(C.dtype).reshape(-1, x.shape[-1])
        if mask is not None:
            x = x[mask.reshape(-1)]
        d, step = x.shape[1], 256
        for i in range(0, d, step):
            j = min(d, i + step)
            C[i:j, :j].addmm_(x[:, i:j].T, x[:, :j])
        return C

    def symmetrize_(C):
        return C.copy_(C.tril() + C.tril(-1).T)
