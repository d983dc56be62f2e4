# All commands of this package, on TensorFlow's official GPU image:
#
#   docker build -t x3d_tf .
#   docker run --rm --gpus=all --user "$(id -u):$(id -g)" -v "$PWD:/work" x3d_tf \
#       python -m x3d_tf.train --gin_file=gin/x3d_s.gin --workdir=runs/x3d_s
#
# Without NVIDIA GPUs: docker build --build-arg TAG=2.21.0 -t x3d_tf .
ARG TAG=2.21.0-gpu

FROM tensorflow/tensorflow:${TAG} AS wheel
COPY . /src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir=/wheels /src

FROM tensorflow/tensorflow:${TAG}
COPY --from=wheel /wheels /wheels
# hadolint ignore=DL3013
RUN set -- /wheels/*.whl \
    && python -m pip install --no-cache-dir "$1[cluster]" \
    && rm -r /wheels \
    && useradd --create-home --uid 10001 x3d \
    && install --directory --owner=x3d /work
COPY docs/cluster/with_tf_config.sh /usr/local/bin/
ENV MPLCONFIGDIR=/tmp/matplotlib
USER 10001
WORKDIR /work
CMD ["python", "-m", "x3d_tf.train", "--help"]
