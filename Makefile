SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: help demo test test-docker check up down bench images docs
.DEFAULT_GOAL := help
export OMP_NUM_THREADS ?= 1

help:  # this list
	@sed -n 's/^\([a-z-]*\):[a-z ]*  *# /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo:  # everything on this machine: installs, starts the stack, trains the demo run, writes its report, stops
	deploy/install.sh cpu reasoning-gym
	.venv/bin/offbeat demo

test: check  # the whole suite, as CI runs it
	deploy/install.sh ray
	.venv/bin/python -m pytest -m "not slow and not gpu and not docker"

test-docker:  # what is tested in containers; where no Docker engine runs, root starts one for the time, of Debian's packages if there is none
	deploy/install.sh cpu reasoning-gym dev
	for program in docker debootstrap $$(docker version >/dev/null 2>&1 || echo dockerd ip); do \
		command -v $$program >/dev/null || { apt-get update && apt-get install -y --no-install-recommends docker.io debootstrap iproute2; } \
	done
	.venv/bin/python -m pytest -m docker tests/docker --require-docker -rP

check:  # the quality gates
	deploy/install.sh cpu reasoning-gym dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

up:  # starts the local stack, which stays
	deploy/install.sh cpu reasoning-gym
	.venv/bin/offbeat up

down:  # stops it
	.venv/bin/offbeat down

docs:  # these documents as a site, in site/
	deploy/install.sh cpu reasoning-gym dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

bench:  # overlap of generation and training, beside its ideal
	deploy/install.sh cpu reasoning-gym
	.venv/bin/python -m benchmarks.overlap

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
VARIANT ?= cuda
BUILD = docker build -f docker/Dockerfile $(foreach LABEL,version=$(VERSION) revision=$(shell git rev-parse HEAD),--label org.opencontainers.image.$(LABEL)) $(BUILD_ARGS)

images:  # the four container images; VARIANT=cpu: those of rollout server and trainer for CPU
	$(BUILD) --target control-plane -t offbeat/control-plane:$(VERSION) .
	$(BUILD) --target reward-server -t offbeat/reward-server:$(VERSION) .
	$(BUILD) --build-arg VARIANT=$(VARIANT) --target rollout-server -t offbeat/rollout-server:$(VERSION)-$(VARIANT) .
	$(BUILD) --build-arg VARIANT=$(VARIANT) --target trainer -t offbeat/trainer:$(VERSION)-$(VARIANT) .
	docker image ls --filter reference='offbeat/*'
