"""Judged conversation: LLaVA-Med's GPT-4 protocol exactly, and a fair variant beside it.

    items = load_items(questions, answers, PROTOCOLS["v1.5"])     # questions.py
    reviews = review(items, judge, settings, folder)              # run.py: asks, resumes, keeps every reply
    summarise(items, reviews)                                     # summary.py: LLaVA-Med's table; fair.py: both orders

A judge (judges.py) is any OpenAI-compatible endpoint, or a GGUF through our own engine. The questions are the user's: LLaVA-Med's are
CC BY-NC and are not shipped, and neither is its instruction (protocol.py tells when a file holds exactly that text).
"""
