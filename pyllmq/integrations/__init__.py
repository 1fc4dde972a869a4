"""Hooks into other libraries; each is imported only when that library is in use."""
