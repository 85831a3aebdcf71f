"""Packaging. Each dependency's reason stands in the README's table."""

from setuptools import find_packages, setup

setup(
    name="genlip-megatron",
    version="0.1.0",
    description="Megatron-style pretraining of GenLIP vision encoders",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["genlip_megatron", "genlip_megatron.*"]),
    package_data={"genlip_megatron": ["recipes/*.yaml"]},
    entry_points={"lmms_eval.models": ["genlip = genlip_megatron.evaluate.lmms:manifest"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core==0.16.1",
        "nvidia-dali-cuda130>=2.4,<2.5",
        "sentencepiece>=0.2,<0.3",
        "tokenizers>=0.21,<0.24",
        "safetensors>=0.5,<0.9",
        "tensorboard>=2.18,<3",
        "numpy>=1.26,<3",
        "simplejpeg>=1.8,<2",
        "xxhash>=3.4,<5",
        "fsspec>=2024.6",
        "braceexpand>=0.1.7,<0.2",
        "pillow>=11,<14",
        "psutil>=6",
        "pyyaml>=6,<7",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "te": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
        "s3": ["s3fs>=2024.6"],
        "hf": ["transformers>=4.56,<6"],
        "dev": [
            "pytest>=8,<10",
            "hypothesis>=6.100,<7",
            "ruff>=0.12,<0.18",
            "mypy>=1.15,<3",
            "codespell>=2.4,<3",
            "s3fs>=2024.6",
            "moto[s3]>=5,<6",
            "flask>=3,<4",
            "flask-cors>=5",
            "webdataset>=1,<2",
            "transformers>=4.56,<6",
        ],
        "wandb": ["wandb>=0.19"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
        # With filelock 4 lmms-eval's datasets 5.2 cannot be imported.
        "lmms": ["lmms-eval>=0.7.3,<0.8", "filelock<4"],
    },
)
