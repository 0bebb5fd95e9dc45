# loratools on torch's CPU build:  docker build -t loratools .
FROM python:3.12-slim
ENV HF_HOME=/cache PIP_NO_CACHE_DIR=1
COPY . /src
RUN pip install uv \
 && uv pip install --system --torch-backend cpu -c /src/constraints.txt '/src[onnx,plot,stats,gguf]' \
 && pip uninstall -y uv \
 && rm -rf /src
WORKDIR /models
ENTRYPOINT ["loratools"]
