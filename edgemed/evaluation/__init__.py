"""Accuracy of the very artifact that a clinic runs: closed accuracy and open recall on medical VQA sets.

    evaluation = evaluate(engine, samples)              # in runner.py

Metrics here are strict; the field's older ones come with a later release. Knows no llama.cpp: it asks an engine.
"""
