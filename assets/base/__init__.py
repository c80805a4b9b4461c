"""Definitions that every asset shares: the context, the two asset factories, checks and events. No asset is here."""
