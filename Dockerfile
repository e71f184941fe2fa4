# sparse-pretrain with the pinned versions, on CUDA, as a user without privileges.
#   docker build -t sparse-pretrain .
#   docker run --rm --gpus all -v "$PWD/runs:/home/trainer/runs" sparse-pretrain train
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv g++ python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home trainer

WORKDIR /opt/sparse-pretrain
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY conf conf
COPY kernels kernels
COPY sparse_pretrain sparse_pretrain
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[slurm,hf]"

ENV PATH=/opt/sparse-pretrain/.venv/bin:$PATH
USER trainer
WORKDIR /home/trainer
ENTRYPOINT ["sparse-pretrain"]
CMD ["--help"]
