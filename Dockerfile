# For a host of one's own: the page on the embedded tower, as an unprivileged user, without any network of its own.
# docker build -t fmclip . && docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:7860:7860 fmclip
# For adapters on the Hugging Face Hub, or a tower from there (FMCLIP_TOWER=hf-hub:...): -e HF_HUB_OFFLINE=0
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 \
    GRADIO_ANALYTICS_ENABLED=False GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=7860 GRADIO_TEMP_DIR=/tmp/gradio \
    HF_HUB_OFFLINE=1 HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib

WORKDIR /app
# a CPU build of torch is a third of the size; build with --build-arg TORCH_INDEX=https://pypi.org/simple for a GPU
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt .
RUN pip install --index-url "$TORCH_INDEX" "torch>=2.8" "torchvision>=0.23" && pip install -r requirements.txt
COPY app.py LICENSE README.md ./
COPY fmclip fmclip
COPY checkpoints checkpoints
COPY examples examples

RUN useradd --uid 1000 --no-create-home fmclip
USER fmclip
EXPOSE 7860
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['GRADIO_SERVER_PORT'])"]
CMD ["python", "app.py"]
