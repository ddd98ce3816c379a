# The installed project on NVIDIA's PyTorch image, with the image's own torch and TransformerEngine.
#
#   docker build --tag lctw-megatron .
#
# Clusters mostly run Apptainer; from the image just built, or from a file of `docker save`
# (docker-archive:FILE), without Docker on the cluster:
#
#   apptainer build lctw-megatron.sif docker-daemon:lctw-megatron:latest
#
# and in a recipe's cluster section, `container: apptainer exec --nv lctw-megatron.sif`.

# 25.12 has Python 3.12 and torch 2.10. Before 25.09 torch is older than what pyproject.toml asks for.
ARG IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${IMAGE}

# From 0.17 on megatron-core wants a newer nvidia-resiliency-ext than the image has.
ARG MEGATRON_CORE=0.16.1

WORKDIR /opt/lctw-megatron
COPY pyproject.toml README.md LICENSE ./
COPY lctw_megatron lctw_megatron
COPY configs configs
COPY recipes recipes

# The image's torch is a build of NVIDIA's with a version of its own (2.10.0a0+...), against which its
# TransformerEngine, apex and flash-attn are compiled. Any torch from elsewhere breaks them, and pip
# would fetch one as soon as it thinks that a package needs it. Hence: constraints that hold what is
# there (in place of the image's, which hold every package, also those that may be newer); what
# depends on torch is installed without its dependencies; at the end nothing that stays has changed.
RUN pip list --format=freeze \
        | grep -iE '^(torch|triton|pytorch|transformer.engine|apex|flash|nvidia|numpy)[^=]*==' \
        | sort > /tmp/stays.txt \
    && grep '^torch==' /tmp/stays.txt \
    && python -c "import tomllib; needs = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; print(*(n for n in needs if not n.startswith(('torch', 'megatron-core'))), sep='\n')" > /tmp/needs.txt \
    && export PIP_CONSTRAINT=/tmp/stays.txt PIP_NO_CACHE_DIR=1 \
    && pip install --requirement /tmp/needs.txt \
    && pip install --no-deps "megatron-core==${MEGATRON_CORE}" . \
    && pip list --format=freeze | sort > /tmp/after.txt \
    && test -z "$(comm -23 /tmp/stays.txt /tmp/after.txt | tee /dev/stderr)" \
    && rm -rf /tmp/stays.txt /tmp/needs.txt /tmp/after.txt build *.egg-info

WORKDIR /workspace
