"""The llama.cpp engine: see messages.py for what goes in and out, engine.py for the parent's side, worker.py for the process."""
