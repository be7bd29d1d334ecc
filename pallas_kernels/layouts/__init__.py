"""Layouts: how one page of a codec's codes and factors lies in memory."""
