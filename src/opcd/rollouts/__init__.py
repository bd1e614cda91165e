"""Engines that let a policy answer prompts."""
