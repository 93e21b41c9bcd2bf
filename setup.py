"""Builds bbfast: Python packages and the Triton kernels under the name bbfast.triton_kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["bbfast", "bbfast.*"]), "bbfast.triton_kernels"],
    package_dir={"bbfast.triton_kernels": "triton_kernels"},
)
