"use strict";

fetch("v1/models")
  .then((answer) => answer.json())
  .then(({ data }) => {
    for (const { id } of data) {
      const item = document.createElement("li");
      item.textContent = id;
      document.getElementById("models").append(item);
    }
  });
