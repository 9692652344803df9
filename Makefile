# Everything a newcomer types: make demo, make test. `make help` lists the rest.
EXTRA ?= cpu
BIN := .venv/bin
INSTALLED := .venv/.installed-$(EXTRA)
CLIENTS := .venv-clients
ROOMS := agents specializers router runtime
.DEFAULT_GOAL := help
.PHONY: help install demo test check format faults soak models portable clients stock ray bench peers clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

$(INSTALLED): pyproject.toml scripts/install.sh
	@scripts/install.sh $(EXTRA)

install: $(INSTALLED) ## Build .venv with the engine (EXTRA=gpu for a GPU machine)

demo: $(INSTALLED) ## Solve fresh puzzles with three roles on three variants, and on the bare base beside it
	@$(BIN)/metier demo

# Two processes: each holds engines and models of its own, 3 GiB at most. A file's tests share engines, so it stays whole.
test: $(INSTALLED) check ## Run the whole test suite
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(INSTALLED) ## Lint, types, and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q . || { echo "run: make format"; exit 1; }
	@mkdir -p .check/metier && for room in $(ROOMS) examples; do ln -sfn ../../$$room .check/metier/$$room; done
	@MYPYPATH=.check $(BIN)/mypy $(ROOMS:%=-p metier.%)
	@$(BIN)/lint-imports --no-cache

format: $(INSTALLED) ## Sort imports and format
	@$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .

faults: $(INSTALLED) ## Campaigns: kill -9 and -STOP, and mutated files, commands, adapters, replies, requests (an hour)
	@$(BIN)/python -m pytest -q -m faults

models: $(INSTALLED) ## Every family of models on the engine, against transformers and peft (half an hour at most)
	@$(BIN)/python -m pytest -q -m models

# Graphs, scripted and remote backends, sessions, store, report, server: what needs no engine.
CORE := tests/agents tests/router tests/runtime/remote tests/runtime/report tests/runtime/runs tests/runtime/server \
	tests/runtime/simulator tests/runtime/store tests/runtime/tools tests/runtime/test_notebook.py

# The package of MCP servers imports fcntl itself; it is none of the core.
OF_MCP := tests/runtime/runs/test_tools.py::test_two_tools_of_one_name_from_a_server_are_refused_at_the_run

portable: $(INSTALLED) ## The core's tests as on other systems: without fcntl, sched_getaffinity and /proc
	@PYTHONPATH=tests/without_linux$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m pytest -q \
		-m 'not engine and not faults and not clients and not stock and not ray and not models' --deselect $(OF_MCP) $(CORE)

soak: $(INSTALLED) ## A simulated day, then two hours on a tiny engine, 50 runs at a time: what grows
	@$(BIN)/python benchmarks/soak.py

$(CLIENTS)/.installed: $(INSTALLED) examples/clients/requirements.txt
	$(BIN)/python -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q -e . -r examples/clients/requirements.txt && touch $@

clients: $(CLIENTS)/.installed ## The SDKs of others, each with its own quick start, in .venv-clients, against a server of ours
	@$(BIN)/python -m pytest -q -m clients

stock: $(INSTALLED) ## vLLM's own server as a backend of ours (a minute)
	@$(BIN)/python -m pytest -q -m stock

ray: $(INSTALLED) ## Engines as replicas on a Ray of our own, ten of them killed (a few minutes)
	@$(BIN)/python -c 'import ray.serve' 2>/dev/null || scripts/install.sh ray
	@$(BIN)/python -m pytest -q -W ignore -m ray && $(BIN)/python -m pytest -q -W ignore tests/runtime/ray/test_ray_settings.py

peers: $(CLIENTS)/.installed ## The same workflow by others' clients on vLLM's server, and by ours (half an hour)
	@$(BIN)/python benchmarks/peers/measure.py

# Those that need nothing but the base model; studies need variants, and say which in their first lines.
BENCHES := routing engine_layer orchestration adapter_swap lora_decode trex_decode fier_kernel semantic_clusters \
	waiting_threads priorities server_overhead report_size

bench: $(INSTALLED) ## The benchmarks that need no variants, paired rounds (tens of minutes)
	@for name in $(BENCHES); do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; done

clean: ## Remove what was built here (not the user's cache)
	@rm -rf .venv $(CLIENTS) .check build *.egg-info .pytest_cache .mypy_cache .ruff_cache
