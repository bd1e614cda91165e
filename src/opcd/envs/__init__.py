"""Text games: environments of several turns, their boards, and episodes through an engine."""
