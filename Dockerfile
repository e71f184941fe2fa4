# sparse-pretrain with the pinned versions, on CUDA, as a user without privileges. Without arguments it does what
# scripts/quickstart does: trains a small GPT dense, with ste and with fst, and shows the result.
#   docker build -t sparse-pretrain .
#   docker run --rm --gpus all sparse-pretrain
#   docker run --rm --gpus all -v "$PWD/runs:/home/trainer/runs" sparse-pretrain train model=gpt2_124m
# The folder that is mounted must be writable for user 1001, or the container run with --user "$(id -u)".
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

# g++ and Python's headers are for Triton, which compiles a launcher for each kernel
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv g++ python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1001 trainer \
    && mkdir /home/trainer/runs \
    && chmod -R a+rwX /home/trainer

WORKDIR /opt/sparse-pretrain
COPY constraints.txt ./
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt torch==2.13.0 triton==3.7.1
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY kernels kernels
COPY sparse_pretrain sparse_pretrain
RUN .venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[slurm,hf]"

ENV PATH=/opt/sparse-pretrain/.venv/bin:$PATH HOME=/home/trainer
USER trainer
WORKDIR /home/trainer
ENTRYPOINT ["sparse-pretrain"]
CMD ["train"]
