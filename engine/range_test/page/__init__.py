"""The page: one HTML file that holds everything, to be read offline, on a phone, on paper and without JavaScript."""

from engine.range_test.page.page import PAGE_NAME, render_page, write_page

__all__ = ["PAGE_NAME", "render_page", "write_page"]
