"""Triton kernels and their launchers: tensors in, tensors out.

Installed as `bbfast.triton_kernels`, since Triton's own project ships a package named `triton_kernels`.
"""

if __name__ != "bbfast.triton_kernels":
    raise ImportError(
        f"bbfast's kernels were imported as {__name__!r}; import bbfast.triton_kernels instead "
        "(run Python from another folder than bbfast's source root, or install bbfast with `pip install -e .`)"
    )
